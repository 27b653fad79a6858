"""greatctl's own architectures through `produce`, the very path of `greatctl train`, on the shared rows."""

from __future__ import annotations

import json
import shutil

import common
import torch

common.stub("pyarrow")  # tables of the curve are not looked at here

from greatctl.events import Run  # noqa: E402
from greatctl.extend.manager import load_plugins  # noqa: E402
from greatctl.sae.data import ActivationRows  # noqa: E402
from greatctl.sae.folder import Origin  # noqa: E402
from greatctl.sae.produce import Request, produce  # noqa: E402
from greatctl.store.shards import ShardReader  # noqa: E402


def main() -> None:
    """One training with the defaults of the product, and one with each rate that is asked for."""
    a = common.arguments()
    facts = json.loads((a.data / "rows.json").read_text())
    held_out = torch.arange(facts["windows"]) >= facts["held_out_from"]
    rows = ActivationRows(ShardReader(a.data), facts["special_ids"], held_out, budget=2**34)
    registry = load_plugins(folder=None).registry
    cls = registry.get("architectures", a.arch)
    options = {"d_in": facts["d_in"], "d_sae": a.d_sae}
    if "k" in cls.Config.model_fields:
        options["k"] = a.k
    rates = [a.lr] if a.lr else [float(rate) for rate in a.rates.split(",") if rate]
    for name, lr in [("default", None), *((f"lr{rate:.1e}", rate) for rate in rates)]:
        folder = a.out / f"ours--{a.arch}--{name}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        request = Request(cls, options, ("tokens", a.tokens), lr, a.batch_size, 10**9, a.seed)
        began = common.clock(a.device)
        produce(
            folder,
            rows,
            request,
            Origin(facts["model"], facts["hook_point"], facts["window"]),
            Run("train"),
            registry=registry,
            device=a.device,
        )
        seconds = round(common.clock(a.device) - began, 1)
        run = {"peer": "ours", "arch": a.arch, "variant": name, "seconds": seconds}
        (folder / "peer.json").write_text(json.dumps(run))
        print(f"{folder.name}: {seconds} s", flush=True)


if __name__ == "__main__":
    main()
