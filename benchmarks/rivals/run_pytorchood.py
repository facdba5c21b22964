"""pytorch-ood on features that lie in a file; one JSON line in, one out. Runs in the rival's own environment."""

import json
import sys
import time
from typing import Any

import numpy as np
import torch
from pytorch_ood import detector as d


def detectors(w: torch.Tensor, b: torch.Tensor, k: int, dim: int) -> dict[str, Any]:
    """Return what makes each detector, and what it looks at."""
    head = torch.nn.Linear(w.shape[1], w.shape[0])
    with torch.no_grad():
        head.weight.copy_(w)
        head.bias.copy_(b)
    head.requires_grad_(False)
    same = torch.nn.Identity()
    shaped = {"backbone": None, "head": torch.nn.Sequential(torch.nn.Flatten(), head)}
    return {  # made only when asked for
        "max-logit": (lambda: d.MaxLogit(None), "logits"),
        "energy": (lambda: d.EnergyBased(None), "logits"),
        "entropy": (lambda: d.Entropy(None), "logits"),
        "gen": (lambda: d.GEN(None, gamma=0.1), "logits"),
        "kl-matching": (lambda: d.KLMatching(None), "logits"),
        "mds": (lambda: d.Mahalanobis(None), "features"),
        "rmd": (lambda: d.RMD(None), "features"),
        "knn": (lambda: d.KNN(None, k=k), "features"),
        "vim": (lambda: d.ViM(None, d=dim, w=w, b=b), "features"),
        "she": (lambda: d.SHE(same, head), "features"),
        "nnguide": (lambda: d.NNGuide(same, head, k=10), "features"),
        "fdbd": (lambda: d.fDBD(same, head), "features"),
        "dice": (lambda: d.DICE(None, w=w, b=b, p=0.7), "features"),
        "react": (lambda: d.ReAct(percentile=0.9, **shaped), "feature_maps"),
        "ash": (lambda: d.ASH(variant="ash-s", percentile=0.9, **shaped), "feature_maps"),
        "scale": (lambda: d.SCALE(percentile=0.85, **shaped), "feature_maps"),
    }


def main() -> None:
    """Answer jobs until there are none."""
    state = {}
    for line in sys.stdin:
        job = json.loads(line)
        try:
            if job["do"] == "load":
                torch.set_num_threads(job["threads"])
                with np.load(job["path"]) as file:
                    state = {key: torch.from_numpy(file[key]) for key in file.files}
                answer = {
                    "versions": {"pytorch-ood": __import__("pytorch_ood").__version__, "torch": torch.__version__}
                }
            else:
                make, kind = detectors(state["w"], state["b"], job["k"], job["dim"])[job["name"]]
                made = make()
                train, test, y = state["train"], state["test"], state["labels"]
                if kind == "logits":
                    train, test = (x @ state["w"].T + state["b"] for x in (train, test))
                if kind == "feature_maps":
                    train, test = train[:, :, None, None], test[:, :, None, None]
                started = time.perf_counter()
                fit = getattr(made, f"fit_{kind}", None)
                if fit is not None:
                    fit(train, y)
                fitted = time.perf_counter()
                with torch.no_grad():
                    score = getattr(made, f"predict_{kind}")(test)
                done = time.perf_counter()
                np.save(job["save"], score.detach().numpy())
                answer = {"fit": fitted - started, "score": done - fitted}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"[:300]}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
