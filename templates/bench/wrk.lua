-- wrk's request and its figures, as one line of JSON: latencies in microseconds.
wrk.headers["Host"] = "service-b:5000"

function done(summary, latency, requests)
  local quantiles = {}
  for _, share in ipairs({50, 75, 90, 95, 99, 99.9, 100}) do
    table.insert(quantiles, string.format('"%g": %d', share / 100, latency:percentile(share)))
  end
  local errors = summary.errors
  io.write(string.format(
    '\n{"requests": %d, "seconds": %f, "errors": %d, "us": {%s}}\n',
    summary.requests, summary.duration / 1e6,
    errors.connect + errors.read + errors.write + errors.status + errors.timeout,
    table.concat(quantiles, ", ")))
end
