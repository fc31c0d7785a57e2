"""The examples that stand below each command's help: what to type, and what for."""

from __future__ import annotations

# command, or command and subcommand: lines as (what to type after `meshdemo`, what it does)
EXAMPLES: dict[str, tuple[tuple[str, str], ...]] = {
    "check": (
        ("check", "what `up` without --runtime needs"),
        ("check --runtime kind", "what a kind cluster needs"),
    ),
    "up": (
        ("up", "service-a calls service-b, 50 requests/s"),
        ("up --rps 200 --replicas service-b=3", "the same mesh with more of both; a running one is changed"),
        ("up --version service-b=v2", "a second version beside the first, for a canary"),
        ("up --app emojivoto", "four services that speak gRPC"),
        ("up --app my-app.yaml --name shop", "your own programs, in a mesh of another name"),
        ("up --runtime kind", "in a kind cluster that is made for it"),
    ),
    "status": (("status -o json", "the same for programs"),),
    "down": (
        ("down", "the mesh mesh-demo"),
        ("down --all", "every mesh of this machine that `up` made"),
    ),
    "demo": (
        ("demo", "the whole story, then the mesh is removed"),
        ("demo --keep", "the mesh stays, to look into it"),
    ),
    "logs": (
        ("logs service-b -f", "its instances and their sidecars, and what comes"),
        ("logs", "all, the control plane and the supervisor included"),
    ),
    "render": (
        ("render envoy --service service-b", "what its sidecars are given"),
        ("render kubernetes --app emojivoto", "what `up` would apply"),
    ),
    "fault": (
        ("fault --lat 200 --err 0.2", "a bad release of service-b: 200 ms slower, 20 % errors"),
        (
            "fault --at mesh --instance service-b-v1-1 --err 0.5 --for 30s",
            "one instance, for 30 s, no restart",
        ),
        ("fault --at mesh --lat 500 --share 0.1", "a tenth of the requests takes half a second longer"),
        ("fault --at mesh --route /work --caller service-a --err 0.1", "one path, for one caller"),
        ("fault --crash", "kill an instance; the runtime starts it again"),
        ("fault --hang --instance service-b-v1-2", "stop one without killing it"),
        ("fault list", "what is in force"),
        ("fault clear", "end all of it"),
    ),
    "fault clear": (
        ("fault clear", "end all faults"),
        ("fault clear f-2f9c1a", "end that one"),
    ),
    "stat": (
        ("stat --by instance", "who is slow or failing"),
        ("stat service-b --by route --window 1m", "which path, over a minute"),
    ),
    "edges": (("edges --window 30s", "who called whom in the last 30 s"),),
    "tap": (
        ("tap service-b --failed", "the requests that fail"),
        ("tap --status 5xx --max 10 -o json", "ten of them, an object a line"),
    ),
    "top": (("top service-b", "its routes, live"),),
    "dashboard": (("dashboard --no-open", "print the address only"),),
    "load": (
        ("load --rps 200", "200 requests per second"),
        ("load --rps 0", "none"),
    ),
    "traffic": (
        ("traffic set service-b --split v1=90,v2=10", "a tenth of the requests to v2"),
        ("traffic set service-b --timeout 500ms --retries 2", "give up after 500 ms, try twice more"),
        ("traffic show service-b", "what is in force, and since when"),
        ("traffic reset service-b", "back to the defaults"),
    ),
    "canary": (
        ("canary service-b --to v2", "5, 25, 50, 100 %, 10 s each"),
        ("canary service-b --to v2 --steps 10,100 --hold 30s", "in two steps of 30 s"),
    ),
    "access": (
        ("access deny service-a service-b", "service-a may not call service-b any more"),
        ("access show", "who may call whom"),
    ),
    "identity": (
        ("identity show", "who has which certificate, and until when"),
        ("identity rotate", "new certificates for all, without a failed request"),
    ),
    "inject": (("inject app.yaml | kubectl apply -f -", "the same manifests, with sidecars"),),
    "uninject": (("uninject meshed.yaml", "the manifests as they were"),),
    "watch": (
        ("watch", "heal by the default policy, with a live dashboard"),
        ("watch --dry-run", "only say what would be done"),
        ("watch --until-healed --for 60s -o jsonl", "for scripts: an event a line, and an exit status"),
        ("watch --policy my-policy.yaml --record signals.jsonl", "keep the signals for `policy test`"),
    ),
    "policy": (
        ("policy check my-policy.yaml", "every problem, with line and column"),
        ("policy test my-policy.yaml --signals signals.jsonl", "what it would have done"),
    ),
    "policy check": (("policy check my-policy.yaml -o json", "the problems for an editor or for CI"),),
    "policy test": (
        ("watch --record signals.jsonl --for 2m", "first record some (with --dry-run nothing is touched)"),
        ("policy test my-policy.yaml --signals signals.jsonl", "then try a policy on them"),
    ),
    "report": (
        ("report", "the incidents of this mesh"),
        ("report --html incidents.html", "as a page to send on"),
    ),
    "bench": (
        ("bench heal --alone", "how fast the five faults are found and healed"),
        ("bench all --quick", "a short look at everything"),
    ),
}


def below(command: str) -> str | None:
    """The text below a command's help; None if there are no examples."""
    lines = EXAMPLES.get(command)
    if lines is None:
        return None
    return "\n".join(
        ["[bold]Examples[/bold]", *(f"meshdemo {typed}\n    [dim]{does}[/dim]" for typed, does in lines)]
    )
