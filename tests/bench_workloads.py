"""What the workloads can carry, on this machine: `python tests/bench_workloads.py`. Not a test; prints figures.

1. start      from the start of the process to the first answer of /healthz
2. capacity   service-b with LAT_MS=200 and 500 requests in flight: p99 should stay under 260 ms
3. rate       the rate that service-a holds at 2,000 requests/s, and what a request costs in CPU time
4. stall      service-b stopped for 1 s: p99 as service-a sees it, next to a client that waits for its answers

wrk (Debian's package) makes the load of 2 and is left out where it is not installed. It is no closed-loop
client for 4: since version 4 it fills in the requests that it did not send (`stats_correct` in its source).
"""

from __future__ import annotations

import http.client
import os
import re
import shutil
import signal
import statistics
import subprocess
import threading
import time

import psutil
from workload_process import Workload, wait_for, workload


def main() -> None:
    """Run all of it."""
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    print(f"{os.cpu_count()} processors, load average {load} before the run")
    start()
    capacity()
    rate()
    stall()


def start() -> None:
    """Time to the first answer."""
    for program in ("service_b", "service_a"):
        times = []
        for _ in range(5):
            begun = time.perf_counter()
            with workload(program, RPS=0) as started:
                started.get("/healthz")
                times.append(time.perf_counter() - begun)
        print(f"start     {program}: median {statistics.median(times):.2f} s, worst {max(times):.2f} s")


def capacity() -> None:
    """500 requests in flight, by a closed-loop client and by service-a at the rate that makes 500."""
    with workload("service_b", LAT_MS=200) as b:
        used = cpu_s(b)
        result = wrk(b, connections=500, seconds=10)
        if result:
            requests, p99_ms = result
            cost = (cpu_s(b) - used) / requests * 1e6
            print(
                f"capacity  wrk -c500: {requests / 10:.0f}/s, p99 {p99_ms:.0f} ms, {cost:.0f} us CPU a request"
            )
        with workload("service_a", TARGET=url(b), RPS=2450) as a:
            time.sleep(3)
            before = histogram(a)
            time.sleep(10)
            in_flight = a.get("/load")[1]["in_flight"]
            p99_s = quantile_s(before, histogram(a), 0.99)
            print(f"capacity  service-a at 2450/s: {in_flight} in flight, p99 at most {p99_s * 1000:.0f} ms")


def rate() -> None:
    """What service-a holds and costs."""
    with workload("service_b") as b, workload("service_a", TARGET=url(b), RPS=2000) as a:
        time.sleep(2)
        used, sent = (cpu_s(a), cpu_s(b)), a.metric('service_a_requests_total{code="200"}')
        time.sleep(10)
        done = a.metric('service_a_requests_total{code="200"}') - sent
        a_us, b_us = (cpu_s(a) - used[0]) / done * 1e6, (cpu_s(b) - used[1]) / done * 1e6
        achieved = a.get("/load")[1]["achieved_rps"]
        print(
            f"rate      2000/s asked, {achieved:.1f}/s sent; CPU a request: a {a_us:.0f} us, b {b_us:.0f} us"
        )


def stall() -> None:
    """The same stall, seen open loop and closed loop."""
    with workload("service_b") as b:
        with workload("service_a", TARGET=url(b), RPS=500) as a:
            wait_for("load", lambda: histogram(a)[-1][1] > 500)
            before = histogram(a)
            stop_for_a_second(b, after_s=4.5)
            time.sleep(4.5)
            p99_s = quantile_s(before, histogram(a), 0.99)
            print(f"stall     open loop, 500/s for 10 s: p99 at most {p99_s * 1000:.0f} ms")
        latencies: list[float] = []
        over = time.monotonic() + 10
        clients = [threading.Thread(target=closed_loop, args=(b, over, latencies)) for _ in range(5)]
        for client in clients:
            client.start()
        stop_for_a_second(b, after_s=4.5)
        for client in clients:
            client.join()
        p99_s = statistics.quantiles(latencies, n=100)[-1]
        print(f"stall     closed loop, {len(latencies) / 10:.0f}/s for 10 s: p99 {p99_s * 1000:.0f} ms")


def closed_loop(b: Workload, over: float, latencies: list[float]) -> None:
    """At about 100/s, one request after the other."""
    connection = http.client.HTTPConnection(b.host, b.port)
    while time.monotonic() < over:
        begun = time.monotonic()
        connection.request("GET", "/work")
        connection.getresponse().read()
        latencies.append(time.monotonic() - begun)
        time.sleep(max(0.0, 0.01 - latencies[-1]))


def stop_for_a_second(b: Workload, after_s: float) -> None:
    time.sleep(after_s)
    b.process.send_signal(signal.SIGSTOP)
    time.sleep(1)
    b.process.send_signal(signal.SIGCONT)


def url(b: Workload) -> str:
    return f"http://127.0.0.1:{b.port}/work"


def cpu_s(of: Workload) -> float:
    times = psutil.Process(of.process.pid).cpu_times()
    return times.user + times.system


def histogram(a: Workload) -> list[tuple[float, float]]:
    """(upper bound in s, cumulative count) of service-a's latencies."""
    buckets = re.findall(r'service_a_latency_seconds_bucket\{le="(\S+)"\} (\S+)', a.get("/metrics")[1])
    return [(float(bound), float(count)) for bound, count in buckets]


def quantile_s(before: list[tuple[float, float]], after: list[tuple[float, float]], q: float) -> float:
    """The upper bound of the bucket that holds the quantile of what happened in between."""
    counts = [(bound, count - old) for (bound, count), (_, old) in zip(after, before, strict=True)]
    return next(bound for bound, count in counts if count >= q * counts[-1][1])


def wrk(b: Workload, connections: int, seconds: int) -> tuple[int, float] | None:
    """Requests done and p99 (ms); None without wrk."""
    if not shutil.which("wrk"):
        return None
    command = ["wrk", "-t1", f"-c{connections}", f"-d{seconds}s", "--timeout", "10s", "--latency", url(b)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    value, unit = re.search(r"99%\s+([\d.]+)(us|ms|s)", text).groups()  # type: ignore[union-attr]
    requests = re.search(r"(\d+) requests in", text)[1]  # type: ignore[index]
    return int(requests), float(value) * {"us": 0.001, "ms": 1.0, "s": 1000.0}[unit]


if __name__ == "__main__":
    main()
