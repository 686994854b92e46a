"""A UNet of diffusers, returning the average: PACE in place of AdamW and `EMAModel`.

    pip install . diffusers
    python examples/diffusers_unet.py --out runs/unet

Runs offline in seconds: a UNet of 40,000 parameters learns to take noise off stripes. The average
is that of `EMAModel(use_ema_warmup=True, power=0.75)`, step for step: PowerEMA(0.75, start=1). With
pullback=0 the UNet is trained by AdamW, as before.
"""

import argparse

import torch
from diffusers import DDPMScheduler, UNet2DModel

from paceline import PACE
from paceline.averaging import PowerEMA

parser = argparse.ArgumentParser()
parser.add_argument("--out", required=True, help="folder to write the UNet to")
out = parser.parse_args().out

torch.manual_seed(0)
unet = UNet2DModel(
    sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, norm_num_groups=4,
    block_out_channels=(8, 16), attention_head_dim=8,
    down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
)  # fmt: skip
noising = DDPMScheduler(num_train_timesteps=100)
opt = PACE(  # <- it was AdamW, and EMAModel(unet.parameters(), use_ema_warmup=True, power=0.75)
    unet.parameters(), lr=1e-2, returns=PowerEMA(0.75, start=1)
)


def loss(count):
    stripes = (torch.arange(8) + torch.randint(4, (count, 1, 1, 1))) % 4 - 1.5
    images = stripes.expand(count, 1, 8, 8)
    noise, times = torch.randn(images.shape), torch.randint(100, (count,))
    found = unet(noising.add_noise(images, noise, times), times).sample
    return torch.nn.functional.mse_loss(found, noise)


for _ in range(200):
    loss(4).backward()
    opt.step()  # <- and ema.step(unet.parameters())
    opt.zero_grad()


@torch.no_grad()
def held_out():
    torch.manual_seed(1)  # the same images, noise and times for both
    return loss(256)


live = held_out()
with opt.averaged():  # <- it was ema.store(...), ema.copy_to(...), ema.restore(...)
    print(f"live weights {live:.3f}, returned {held_out():.3f}")
    unet.save_pretrained(out)
