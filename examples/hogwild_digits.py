"""One CNN trained by one process and then by two that share its parameters: the same accuracy, less time.

    python examples/hogwild_digits.py

The times are what a user waits for, from the call to the trained model, starting the workers included; only the fork
server, from which the workers of both come, is started before. Each worker computes in one thread.
"""
import argparse
import functools
import time

import thinwire.hogwild
import torch
from sklearn.datasets import load_digits
from torch import nn


def digits():
    """Images [1797, 1, 8, 8] and labels; the first 1500 are to train on, in an order that is always the same."""
    pixels, labels = (torch.as_tensor(a) for a in load_digits(return_X_y=True))
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    return pixels[order].float().view(-1, 1, 8, 8) / 16, labels[order]


def make_batches(worker, workers):
    """Endless random batches. Every worker may draw from all of the data, each in an order of its own."""
    images, labels = digits()
    generator = torch.Generator().manual_seed(worker)
    while True:
        batch = torch.randint(1500, (32,), generator=generator)
        yield images[batch], labels[batch]


def loss_fn(model, batch):
    images, labels = batch
    return nn.functional.cross_entropy(model(images), labels)


def new_model():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(512, 10),
    )  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=3000, help="of all workers together (default 3000)")
    parser.add_argument("--density", type=float, default=0.1, help="share of the blocks in an update (default 0.1)")
    args = parser.parse_args()

    with thinwire.hogwild.Workers(1):
        pass  # the fork server is there from now on
    images, labels = digits()
    seconds = {}
    for workers in (1, 2):
        model = new_model()
        begin = time.perf_counter()
        report = thinwire.hogwild.train(
            model, make_batches, loss_fn, optimizer=functools.partial(torch.optim.SGD, lr=0.1), workers=workers,
            density=args.density, memory="error_feedback", updates=args.updates,
        )  # fmt: skip
        seconds[workers] = time.perf_counter() - begin
        model.eval()
        with torch.no_grad():
            accuracy = (model(images[1500:]).argmax(1) == labels[1500:]).float().mean()
        print(f"{workers} worker{'s' * (workers > 1)}: accuracy {accuracy:.3f} after {report.updates} updates in "
              f"{seconds[workers]:.1f} s, {report.updates_per_second:.0f} a second")  # fmt: skip
    print(f"delay at most {report.max_delay} updates; inconsistency {report.inconsistency_mean:.1f} on average, "
          f"{report.inconsistency_max:.1f} at most; the theory allows {report.bound:.0f}")  # fmt: skip
    ratio = seconds[1] / seconds[2]
    print(f"two workers took {'less' if ratio > 1 else 'no less'} time than one: {ratio:.2f} times the speed")


if __name__ == "__main__":  # workers import this file
    main()
