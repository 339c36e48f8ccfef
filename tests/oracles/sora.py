"""SoRA (arXiv 2311.11696): the operator by cases, Adam with it on one number; our steering."""

from __future__ import annotations


def soft(x: float, xi: float) -> float:
    if x > xi:
        return x - xi
    return x + xi if x < -xi else 0.0


def adam_then_soft(g: float, grads: list[float], lr: float, xi: float) -> list[float]:
    """g after each step of Adam (0.9, 0.999, 1e-8) and the threshold."""
    m = v = 0.0
    course = []
    for t, slope in enumerate(grads, 1):
        m, v = 0.9 * m + 0.1 * slope, 0.999 * v + 0.001 * slope**2
        g = soft(g - lr * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)) ** 0.5 + 1e-8), xi)
        course.append(g)
    return course


def first_threshold(sizes: list[float], zeros: int, steps: int) -> float:
    return sorted(map(abs, sizes))[zeros - 1] / steps


def next_threshold(xi: float, sizes: list[float], zeros: int) -> float:
    within = sum(size <= xi for size in sizes)
    return xi * 1.05 if within < zeros else xi / 1.05
