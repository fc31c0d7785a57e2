// What the demo needs to change: each button opens a dialog that says what will happen and which command does the
// same, and asks, before anything is done.

import { html, plural, setText } from "./words.js";

const by = (id) => document.getElementById(id);

export function dialogs({ snapshot, chosen, call, say, faultText }) {
  // open: fill in; change: returns the command that does the same; problem: why it cannot be done as it stands.
  function dialog(id, { open, change, problem, go }) {
    const element = by(id), form = element.querySelector("form"), button = element.querySelector("button[value=go]");
    const read = () => Object.fromEntries(new FormData(form));
    const changed = () => {
      change?.(read());
      const command = element.querySelector("[data-command]"), trouble = problem?.(read()) ?? "";
      if (command) setText(command, commandOf[id](read()));
      setText(element.querySelector("[data-problem]"), trouble && `✗ ${trouble}`);
      button.disabled = Boolean(trouble);
    };
    document.querySelector(`[data-dialog="${id}"]`).addEventListener("click", () => {
      if (!snapshot()) return;
      for (const select of element.querySelectorAll("[data-services]")) {
        const several = select.dataset.services === "versions";
        const names = snapshot().services.filter((service) => !several || service.versions.length > 1).map((service) => service.name);
        select.replaceChildren(...names.map((name) => new Option(name, name, false, name === chosen())));
      }
      element.returnValue = "";
      open?.(read());
      changed();
      element.showModal();
    });
    form.addEventListener("input", changed);
    element.addEventListener("close", () => { if (element.returnValue === "go") go(read()); });
  }

  async function act(words, method, path, body) {
    try {
      const { effect } = await call(method, path, body);
      say(`✓ ${words}${effect ? `: in force after ${effect.effective_ms.toFixed(0)} ms on ${plural(effect.sidecars, "sidecar")}` : ""}`);
    } catch (error) { say(`✗ ${words}: ${error.message}`); }
  }

  const serviceOf = (name) => snapshot().services.find((one) => one.name === name);

  // Where in a service: all of it, a version, an instance.
  function fillPlaces(name) {
    const select = by("fault-place");
    if (select.dataset.service === name) return;
    select.dataset.service = name;
    const options = [new Option("all instances", "")];
    for (const version of serviceOf(name)?.versions ?? []) {
      options.push(new Option(`version ${version.version}`, `version=${version.version}`));
      for (const instance of version.instances) options.push(new Option(`instance ${instance.id}`, `instance=${instance.id}`));
    }
    select.replaceChildren(...options);
  }
  const place = (f) => { const at = f.place.indexOf("="); return at < 0 ? {} : { [f.place.slice(0, at)]: f.place.slice(at + 1) }; };
  const share = (f) => Number((Number(f.err) / 100).toFixed(4));

  dialog("fault-dialog", {
    open: (f) => { delete by("fault-place").dataset.service; fillPlaces(f.service); },
    change: (f) => fillPlaces(f.service),
    problem: (f) => (Number(f.lat_ms) || Number(f.err) ? "" : "A fault needs a latency or a share of errors above 0."),
    go: (f) => act(`Fault on ${f.place ? Object.values(place(f))[0] : f.service}`, "POST", "/v1/faults", { at: "mesh", service: f.service, ...place(f), lat_ms: Number(f.lat_ms), err_rate: share(f), ...(Number(f.for) ? { for_s: Number(f.for) } : {}) }),
  });
  dialog("clear-dialog", {
    open: () => {
      const faults = snapshot().faults;
      by("clear-what").replaceChildren(...faults.map((fault) => html("li", { textContent: `${faultText(fault)}${fault.at === "mesh" ? "" : ` stays, for it is in the ${fault.at}; this clears it: meshdemo --name ${snapshot().mesh} fault clear ${fault.id}`}` })));
    },
    problem: () => (snapshot().faults.some((fault) => fault.at === "mesh") ? "" : "None of them is in the sidecars, so none can be cleared from here: use the commands."),
    go: () => act("Faults cleared", "DELETE", "/v1/faults?at=mesh"),
  });

  const weights = () => [...by("split-weights").querySelectorAll("input")].map((input) => [input.name.slice(2), Number(input.value)]);
  const sum = () => weights().reduce((total, [, weight]) => total + weight, 0);
  function fillWeights(name) {
    const host = by("split-weights");
    if (host.dataset.service === name) return;
    host.dataset.service = name;
    host.replaceChildren(...(serviceOf(name)?.versions ?? []).map((version, index) => html("label", {}, `${version.version}, %`,
      html("input", { type: "number", min: 0, max: 100, step: 1, name: `w-${version.version}`, value: version.weight ?? (index === 0 ? 100 : 0) }))));
  }
  dialog("split-dialog", {
    open: (f) => { delete by("split-weights").dataset.service; fillWeights(f.service ?? ""); },
    change: (f) => fillWeights(f.service ?? ""),
    problem: (f) => (!f.service ? "No service has a second version; this brings one: meshdemo up --version SERVICE=VERSION" : sum() === 100 ? "" : `The weights sum to ${sum()}; they must sum to 100.`),
    go: (f) => act(`Traffic of ${f.service}`, "PUT", `/v1/traffic/${encodeURIComponent(f.service)}`, { split: Object.fromEntries(weights()) }),
  });

  dialog("load-dialog", {
    open: () => { if (snapshot().load_rps !== null && snapshot().load_rps !== undefined) by("load-rps").value = snapshot().load_rps; },
    problem: (f) => (!snapshot().load.length ? "No service of this app makes load." : f.rps === "" ? "Say how many requests a second." : ""),
    go: (f) => act(`Load of ${f.rps} requests/s`, "PUT", "/v1/load", { rps: Number(f.rps) }),
  });

  const commandOf = {
    "fault-dialog": (f) => ["meshdemo fault --at mesh", `--service ${f.service}`, ...Object.entries(place(f)).map(([name, value]) => `--${name} ${value}`), Number(f.lat_ms) ? `--lat ${f.lat_ms}` : "", Number(f.err) ? `--err ${share(f)}` : "", Number(f.for) ? `--for ${f.for}s` : ""].filter(Boolean).join(" "),
    "clear-dialog": () => "meshdemo fault clear",
    "split-dialog": (f) => `meshdemo traffic set ${f.service ?? "SERVICE"} --split ${weights().map(([version, weight]) => `${version}=${weight}`).join(",")}`,
    "load-dialog": (f) => `meshdemo load --rps ${f.rps}`,
  };
}
