"""The torch side of benchmarks/peer.py: a process of its own that reads and answers lines of JSON.

Runs under any Python that has torch and diffusers (requirements-bench.txt), and imports nothing of this project. The
first line says what to build; each later one, {"run": "step"} or {"run": "forward"}, is answered with {"seconds": ...}.
The process ends with its input.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import platform
import sys
import time
from collections.abc import Callable
from typing import Any

NEEDS = ("torch", "diffusers")
ADAM_BETA2 = 0.999


def answer(file: Any, **values: Any) -> None:
    """Write a line for the other side."""
    file.write(json.dumps(values) + "\n")
    file.flush()


def build_network(settings: dict[str, Any]) -> Any:
    """Build UNet2DModel as diffusers configures it for NCSN++ (google/ncsnpp-celebahq-256)."""
    from diffusers import UNet2DModel

    kinds = ["Attn" if attends else "" for attends in settings["attention"]]
    return UNet2DModel(
        sample_size=settings["image_size"],
        in_channels=settings["num_channels"],
        out_channels=settings["num_channels"],
        center_input_sample=True,
        time_embedding_type="fourier",
        down_block_types=tuple(f"{kind}SkipDownBlock2D" for kind in kinds),
        up_block_types=tuple(f"{kind}SkipUpBlock2D" for kind in reversed(kinds)),
        block_out_channels=tuple(settings["channels"]),
        layers_per_block=settings["num_res_blocks"],
        mid_block_scale_factor=math.sqrt(2),
        dropout=settings["dropout"],
        attention_head_dim=None,  # one head
        norm_num_groups=None,  # a quarter of the channels, 32 at most
        norm_eps=1e-6,
    )


class Peer:
    """A UNet2DModel `network` with its optimizer, its average and a batch."""

    def __init__(self, settings: dict[str, Any]):
        import torch
        from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

        torch.manual_seed(0)
        size, channels = settings["image_size"], settings["num_channels"]
        self._torch, self._settings = torch, settings
        self.network = build_network(settings)
        self._average = AveragedModel(self.network, multi_avg_fn=get_ema_multi_avg_fn(settings["ema_rate"]))
        self._optimizer = torch.optim.Adam(
            self.network.parameters(),
            lr=settings["lr"],
            betas=(settings["beta1"], ADAM_BETA2),
            eps=settings["eps"],
            fused=True,  # the fastest of torch's three
        )
        warm_up = max(settings["warmup"], 1)
        self._schedule = torch.optim.lr_scheduler.LambdaLR(self._optimizer, lambda step: min(step / warm_up, 1))
        self._levels = torch.randint(0, 256, (settings["batch_size"], channels, size, size), dtype=torch.uint8)
        # The average is taken of the network itself: compiled, it shares the parameters.
        self._apply = torch.compile(self.network) if settings["compile"] else self.network

    def step(self) -> None:
        """Take a training step of the VE SDE: scaling, flips, noise, loss, gradient, clipping, Adam, average."""
        torch, settings = self._torch, self._settings
        self.network.train()
        x = self._levels.to(torch.float32) / 255
        flips = torch.rand(len(x), 1, 1, 1) < 0.5
        x = torch.where(flips, x.flip(3), x)
        low, high = settings["sigma_min"], settings["sigma_max"]
        sigma = low * (high / low) ** (torch.rand(len(x)) * (1 - 1e-5) + 1e-5)
        std, z = sigma[:, None, None, None], torch.randn_like(x)
        score = self._apply(x + std * z, sigma, return_dict=False)[0]
        loss = (score * std + z).square().sum(dim=(1, 2, 3)).mul(0.5).mean()
        self._optimizer.zero_grad()
        loss.backward()
        if settings["grad_clip"] >= 0:
            torch.nn.utils.clip_grad_norm_(self.network.parameters(), settings["grad_clip"])
        self._optimizer.step()
        self._schedule.step()
        self._average.update_parameters(self.network)
        if not math.isfinite(loss.item()):
            raise RuntimeError("the loss of the torch side is not finite")

    def forward(self) -> None:
        """Evaluate the network for a batch, without dropout and gradients."""
        torch = self._torch
        self.network.eval()
        with torch.inference_mode():
            x = self._levels.to(torch.float32) / 255
            self._apply(x, torch.linspace(0.1, 1, len(x)), return_dict=False)

    def count_flops(self, call: Callable[[], None]) -> int:
        """Return the operations of convolutions and matrix products, zeros of padding included."""
        from torch.utils.flop_counter import FlopCounterMode

        compiled, self._apply = self._apply, self.network  # it counts calls of operators
        with FlopCounterMode(display=False) as counter:
            call()
        self._apply = compiled
        return int(counter.get_total_flops())


def describe(peer: Peer, warm_up: int) -> dict[str, Any]:
    """Warm up, and return the sizes, versions and threads."""
    import diffusers
    import torch

    flops = {name: peer.count_flops(getattr(peer, name)) for name in ("step", "forward")}
    start = time.perf_counter()
    for _ in range(warm_up):
        peer.step()
        peer.forward()
    return {
        "parameters": sum(each.numel() for each in peer.network.parameters()),
        "flops_with_padding": flops,
        "warm_up_seconds": time.perf_counter() - start,
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
    }


def main() -> None:
    """Read lines and answer them."""
    # Keep what libraries print out of the answers.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    settings = json.loads(sys.stdin.readline())
    for name in NEEDS:
        try:
            importlib.import_module(name)
        except ImportError as error:
            answer(answers, missing=f"{name} ({error})")
            return
    answer(answers, found=list(NEEDS))
    peer = Peer(settings)
    answer(answers, **describe(peer, settings["warm_up"]))
    runs = {"step": peer.step, "forward": peer.forward}
    for line in sys.stdin:
        run = runs[json.loads(line)["run"]]
        start = time.perf_counter()
        run()
        answer(answers, seconds=time.perf_counter() - start)


if __name__ == "__main__":
    main()
