// What the demo needs to change: each button opens a dialog that says what will happen and which command does the
// same, and asks, before anything is done.

import { html, plural, setText } from "./words.js";

const by = (id) => document.getElementById(id);

export function dialogs({ snapshot, chosen, call, say, command, faultText }) {
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

  // What the control plane does itself answers with an effect; what its runtime does, as the command does.
  async function act(words, method, path, body) {
    say(`… ${words}`, true);
    try {
      const answer = await call(method, path, body), effect = answer.effect ?? answer;
      const where = effect.sidecars ? plural(effect.sidecars, "sidecar") : effect.instances?.join(", ");
      say(`✓ ${words}${effect.effective_ms === undefined ? "" : `: in force after ${effect.effective_ms.toFixed(0)} ms${where ? ` on ${where}` : ""}`}`);
    } catch (error) { say(`✗ ${words}: ${error.message}`); }
  }

  const serviceOf = (name) => snapshot().services.find((one) => one.name === name);

  // Where in a service: all of it (of processes: any one), a version, an instance.
  function fillPlaces(name, what) {
    const select = by("fault-place"), key = `${name}/${ofProcess(what)}`;
    if (select.dataset.key === key) return;
    select.dataset.key = key;
    const options = [new Option(ofProcess(what) ? "any instance" : "all instances", "")];
    for (const version of serviceOf(name)?.versions ?? []) {
      options.push(new Option(`version ${version.version}`, `version=${version.version}`));
      for (const instance of version.instances) options.push(new Option(`instance ${instance.id}`, `instance=${instance.id}`));
    }
    select.replaceChildren(...options);
  }
  const place = (f) => { const at = f.place.indexOf("="); return at < 0 ? {} : { [f.place.slice(0, at)]: f.place.slice(at + 1) }; };
  const share = (f) => Number((Number(f.err) / 100).toFixed(4));
  const ofProcess = (what) => what === "crash" || what === "hang";
  const harm = (f) => (ofProcess(f.what) ? {} : { ...(Number(f.lat_ms) ? { lat_ms: Number(f.lat_ms) } : {}), ...(share(f) ? { err_rate: share(f) } : {}), ...(Number(f.for) ? { for_s: Number(f.for) } : {}) });
  const SAYS = {
    app: "A new revision of the workload, with LAT_MS and ERR_RATE: its instances really restart, as a bad release would have them.",
    mesh: "Requests will really fail or wait, in the sidecars. No process restarts.",
    crash: "The process of an instance is really killed. Its supervisor starts it again.",
    hang: "The process of an instance is really stopped, without being killed, until the fault is cleared.",
  };
  // The control plane of a mesh of local processes can have them changed; that of a cluster may not.
  const cannot = (what) => what !== "mesh" && !snapshot().by_hand;

  dialog("fault-dialog", {
    open: (f) => {
      delete by("fault-place").dataset.key;
      if (!by("fault-what").touched) by("fault-what").value = snapshot().by_hand ? "app" : "mesh";
      by("fault-what").touched = true;
      fillPlaces(f.service, by("fault-what").value);
    },
    change: (f) => {
      fillPlaces(f.service, f.what);
      setText(by("fault-says"), SAYS[f.what]);
      by("fault-harm").hidden = ofProcess(f.what);
    },
    problem: (f) => (cannot(f.what) ? "Not from here: this control plane may not change what runs. Type the command below." : ofProcess(f.what) || Number(f.lat_ms) || Number(f.err) ? "" : "A fault needs a latency or a share of errors above 0."),
    go: (f) => {
      const name = f.place ? Object.values(place(f))[0] : f.service;
      if (f.what === "mesh") return act(`Fault on ${name}`, "POST", "/v1/faults", { at: "mesh", service: f.service, ...place(f), ...harm(f) });
      return act({ app: `Bad release of ${name}`, crash: `Killing ${name}`, hang: `Hanging ${name}` }[f.what], "POST", "/v1/hand/faults", { kind: ofProcess(f.what) ? f.what : "degrade", service: f.service, ...place(f), ...harm(f) });
    },
  });
  const stays = (fault) => cannot(fault.at);
  dialog("clear-dialog", {
    open: () => {
      by("clear-what").replaceChildren(...snapshot().faults.map((fault) => html("li", { textContent: `${faultText(fault)}${stays(fault) ? ` stays, for it is in the ${fault.at}; this clears it: ${command(`fault clear ${fault.id}`)}` : ""}` })));
    },
    problem: () => (snapshot().faults.every(stays) ? "None of them is in the sidecars, so none can be cleared from here: use the commands." : ""),
    go: () => act("Faults cleared", "DELETE", snapshot().faults.every((fault) => fault.at === "mesh") || !snapshot().by_hand ? "/v1/faults?at=mesh" : "/v1/hand/faults"),
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
    problem: (f) => (!f.service ? "No service has a second version; this brings one: " + command("up --version SERVICE=VERSION") : sum() === 100 ? "" : `The weights sum to ${sum()}; they must sum to 100.`),
    go: (f) => act(`Traffic of ${f.service}`, "PUT", `/v1/traffic/${encodeURIComponent(f.service)}`, { split: Object.fromEntries(weights()) }),
  });

  dialog("load-dialog", {
    open: () => { if (snapshot().load_rps !== null && snapshot().load_rps !== undefined) by("load-rps").value = snapshot().load_rps; },
    problem: (f) => (!snapshot().load.length ? "No service of this app makes load." : f.rps === "" ? "Say how many requests a second." : ""),
    go: (f) => act(`Load of ${f.rps} requests/s`, "PUT", "/v1/load", { rps: Number(f.rps) }),
  });

  const commandOf = {
    "fault-dialog": (f) => {
      const { lat_ms: lat, err_rate: err, for_s: seconds } = harm(f);
      return command(["fault", { mesh: "--at mesh", crash: "--crash", hang: "--hang" }[f.what], `--service ${f.service}`, ...Object.entries(place(f)).map(([name, value]) => `--${name} ${value}`), lat && `--lat ${lat}`, err && `--err ${err}`, seconds && `--for ${seconds}s`].filter(Boolean).join(" "));
    },
    "clear-dialog": () => command("fault clear"),
    "split-dialog": (f) => command(`traffic set ${f.service ?? "SERVICE"} --split ${weights().map(([version, weight]) => `${version}=${weight}`).join(",")}`),
    "load-dialog": (f) => command(`load --rps ${f.rps}`),
  };
}
