"""Random requests, settings and depths of asynchronous scheduling."""

from __future__ import annotations

import random

from echo_pool import settings
from paged_world import World


def random_world(source: random.Random) -> World:
    retained, residual = source.choice([(4, 4), (4, 8), (8, 4), (12, 4), (12, 8)])
    echo = settings(
        mode=source.choice(["auto", "auto", "full", "compressed"]),
        strict=source.random() < 0.8,
        recent_tokens=source.choice([0, 3, 8, 16]),
        retained_block_size=retained,
        residual_block_size=residual,
        restore_steps=source.choice([1, 4]),
        restore_below=source.choice([0.5, 0.9]),
        admit_full_below=source.choice([0.9, 1.0]),
        watermark=source.choice([0, 0.05]),
        look_ahead=source.random() < 0.5,
    )
    largest = 400 // min(retained, residual)
    return World(
        max(40, source.randint(largest // 3, largest)),
        echo,
        caching=source.random() < 0.8,
        depth=source.choice([0, 0, 1, 2]),
        budget=source.choice([16, 48, 128]),
        max_running=source.choice([4, 16]),
        gate=source.random() < 0.7,
    )


def play(seed: int, num_requests: int) -> World:
    """Random arrivals, aborts, modes, shared prefixes and settings; checks after every step."""
    source = random.Random(seed)
    world = random_world(source)
    prefixes = [[source.randrange(50) for _ in range(size)] for size in (16, 48, 70)]
    num_left = num_requests
    while num_left or world.running or world.waiting:
        if num_left and source.random() < 0.4:
            num_left -= 1
            shared = source.choice(prefixes)[: source.randint(1, 70)]
            tokens = shared if source.random() < 0.7 else []
            tokens = tokens + [source.randrange(50) for _ in range(source.randint(1, 30))]
            mode = source.choice([None, None, "auto", "full", "compressed"])
            world.add(f"q{num_left}", tokens, mode, source.randint(1, 30))
        alive = [*world.running, *world.waiting]
        if alive and source.random() < 0.03:
            world.abort(source.choice(alive))
        if world.running or world.waiting:
            world.step()
        if world.echo.strict and not world.in_flight:
            world.check_published()
    world.run()
    world.check_idle()
    return world
