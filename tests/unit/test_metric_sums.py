"""Metrics of several workers, added up."""

from __future__ import annotations

from broker import metric_sums, metrics


def told(by: float, hot: float, images: float) -> metric_sums.Families:
    made = metrics.create("1")
    made.tickets.inc("download", "granted", "s", by=by)
    made.signing_seconds.observe(2e-5, "s3")
    made.hot_bytes.set(hot)
    made.images.set(images, "active")
    return metric_sums.read(made.render().decode())


def test_counters_and_histograms_add_up_and_what_the_catalogue_says_counts_once() -> None:
    text = metric_sums.render(metric_sums.add(told(3, 10, 7), told(4, 20, 8))).decode().splitlines()
    assert 'broker_tickets_total{operation="download",outcome="granted",store="s"} 7.0' in text
    assert 'broker_signing_seconds_count{kind="s3"} 2.0' in text
    assert 'broker_signing_seconds_bucket{kind="s3",le="2.5e-05"} 2.0' in text
    assert "broker_hot_bytes 30.0" in text
    assert 'broker_images{status="active"} 8.0' in text
    assert 'broker_info{version="1"} 1.0' in text


def test_of_the_dead_the_counts_stay() -> None:
    text = metric_sums.render(metric_sums.add(metric_sums.without_gauges(told(3, 10, 7)), told(0, 20, 7))).decode().splitlines()
    assert 'broker_tickets_total{operation="download",outcome="granted",store="s"} 3.0' in text
    assert "broker_hot_bytes 20.0" in text


def test_one_worker_is_told_as_it_is() -> None:
    made = metrics.create("1")
    made.exclusions.inc("avoided")
    made.http_seconds.observe(0.1, "getVersion")
    text = made.render()
    assert metric_sums.render(metric_sums.read(text.decode())) == text


def test_every_gauge_that_is_the_same_for_all_exists() -> None:
    gauges = {name for name, family in told(1, 1, 1).items() if family.kind == "gauge"}
    assert gauges >= {"broker_images", "broker_info", "broker_hot_bytes"}
    registered = {name for metric in metrics.create("1").registry.collect() for name in (metric.name,)}
    assert registered >= metric_sums.SAME_FOR_ALL
