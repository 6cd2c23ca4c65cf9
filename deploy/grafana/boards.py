"""What the Grafana dashboards show. Each entry of `BOARDS` becomes a file of dashboards/ by ``python -m deploy.grafana.make``.

Rules
- Every expression keeps to the installation that is chosen above (``job``). Counters are added up over brokers; gauges that the
  catalogue tells are the same at every broker, so the largest counts.
- What alerts go by is a recording rule (deploy/prometheus/rules.yml); dashboards show that same rule.
- Units are Grafana's. No panel without a sentence on how to read it, where the title does not say it all.
"""

from __future__ import annotations

from typing import NamedTuple

J = 'job="$job"'
BOTH, STORE = "store, direction", "{{store}} {{direction}}"
"""Labels, and how a series that has them is called."""


class Query(NamedTuple):
    """An expression, and how its series are called: a text with ``{{label}}``."""

    expr: str
    legend: str = ""


class Panel(NamedTuple):
    """A graph of half the width; a ``heatmap`` of buckets; or a ``stat``, one number of a sixth of the width."""

    title: str
    unit: str
    queries: tuple[Query, ...]
    text: str = ""
    kind: str = "timeseries"
    stacked: bool = False
    most: float | None = None


class Board(NamedTuple):
    uid: str
    title: str
    panels: tuple[Panel, ...]


# -- expressions


def rate(metric: str, by: str = "", where: str = "") -> str:
    """A counter by second, added up over brokers."""
    return f"sum by ({by}) (rate({select(metric, where)}[$__rate_interval]))"


def level(metric: str, by: str = "", where: str = "") -> str:
    """A gauge of which every broker tells the same."""
    return f"max by ({by}) ({select(metric, where)})"


def total(metric: str, by: str = "", where: str = "") -> str:
    """A gauge of which every broker tells its own part."""
    return f"sum by ({by}) ({select(metric, where)})"


def quantile(share: float, histogram: str, by: str = "", where: str = "") -> str:
    """What that share of a histogram's observations is below."""
    return f"histogram_quantile({share:g}, {rate(f'{histogram}_bucket', f'{by}, le'.lstrip(', '), where)})"


def mean(histogram: str, by: str = "") -> str:
    return f"{rate(f'{histogram}_sum', by)} / {rate(f'{histogram}_count', by)}"


def path(metric: str, of: str) -> str:
    """What the worst, median or best site sees of each store."""
    return level(metric, BOTH, f'of="{of}"')


def select(metric: str, where: str = "") -> str:
    return f"{metric}{{{', '.join(filter(None, (J, where)))}}}"


def graph(title: str, unit: str, *queries: Query, text: str = "", stacked: bool = False, most: float | None = None) -> Panel:
    return Panel(title, unit, queries, text, stacked=stacked, most=most)


def stat(title: str, unit: str, expr: str, text: str = "") -> Panel:
    return Panel(title, unit, (Query(expr),), text, "stat")


def halves(histogram: str, by: str, legend: str, where: str = "") -> tuple[Query, Query]:
    """Median and 99th percentile."""
    return (Query(quantile(0.5, histogram, by, where), f"{legend} p50"), Query(quantile(0.99, histogram, by, where), f"{legend} p99"))


# -- boards

ASKED = 'operation=~"createTicket|createTickets|refreshTicket|activatePlace|reportTransfer|commitUpload"'

TICKETS = Board(
    "broker-tickets",
    "Transfer broker: tickets",
    (
        stat("Tickets", "reqps", rate("broker_tickets_total")),
        stat("Granted, 5 min", "percentunit", f"min by (job) ({select('job_operation:broker_tickets_granted:ratio_rate5m')})"),
        stat("Errors (5xx), 5 min", "percentunit", select("job:broker_http_errors:ratio_rate5m")),
        stat("Brokers", "none", f"count({select('up')} == 1)"),
        stat("Restarts, 1 h", "none", f"sum(changes({select('process_start_time_seconds')}[1h]))"),
        stat("Images", "none", f"sum({level('broker_images', 'status')})"),
        graph("Tickets", "reqps", Query(rate("broker_tickets_total", "operation, outcome"), "{{operation}} {{outcome}}"), stacked=True),
        graph(
            "Granted", "percentunit", Query(select("job_operation:broker_tickets_granted:ratio_rate5m"), "{{operation}} granted"),
            Query(select("job_operation:broker_tickets_refused:ratio_rate5m"), "{{operation}} refused"), most=1,
            text="Share of the tickets that named a place; the rest was refused, for lack of slots, sources or destinations.",
        ),
        graph(
            "Why candidates were left out", "reqps", Query(rate("broker_exclusions_total", "reason"), "{{reason}}"),
            text="Every replica or store that a ticket did not offer counts once, by the reason that the ticket gives.",
        ),
        graph("First place", "reqps", Query(rate("broker_tickets_total", "store", 'outcome="granted"'), "{{store}}"), stacked=True),
        graph("Requests", "reqps", Query(rate("broker_http_requests_total", "operation"), "{{operation}}"), stacked=True),
        graph(
            "Refused and failed requests", "reqps",
            Query(rate("broker_http_requests_total", "operation, status", 'status=~"4..|5.."'), "{{operation}} {{status}}"),
        ),
        graph(
            "Time to answer", "s", *halves("broker_http_request_seconds", "operation", "{{operation}}", ASKED),
            text="What a request waits for a slot (wait) is part of it.",
        ),
        graph(
            "Slowest operations, p99 over 5 min", "s",
            Query(f"topk(5, {select('job_operation:broker_http_request_seconds:p99_5m')})", "{{operation}}"),
        ),
        graph("Time to sign", "s", *halves("broker_signing_seconds", "kind", "{{kind}}"), text="One URL or token."),
        graph(
            "Blobs found in memory", "percentunit", Query(select("job:broker_hot_hits:ratio_rate5m"), "found"), most=1,
            text="A miss costs a look-up in the database, which many requests share.",
        ),
        graph(
            "Memory: look-ups and evictions", "reqps", Query(rate("broker_hot_misses_total"), "looked up"),
            Query(rate("broker_hot_evictions_total"), "made room"),
        ),
        graph("Memory: size", "bytes", Query(total("broker_hot_bytes", "instance"), "{{instance}}")),
    ),
)  # fmt: skip

RIGHT = "job_direction:broker_estimates_within_factor_2:ratio_rate1h"

RANKING = Board(
    "broker-ranking",
    "Transfer broker: quality of the ranking",
    (
        stat("Right within a factor of 2, 1 h", "percentunit", f"min({select(RIGHT)})"),
        stat("Reports per ticket, 1 h", "none", select("job:broker_reports_per_ticket:ratio_rate1h")),
        stat("Reports", "reqps", rate("broker_reports_total")),
        Panel(
            "Reported over estimated seconds", "none",
            (Query(rate("broker_estimate_error_ratio_bucket", "le"), "{{le}}"),), kind="heatmap",
            text="1 is an estimate that came true; above it transfers took longer than they were told. "
            "A band far from 1 is declared bandwidth that is wrong, or traffic that nobody leases.",
        ),
        graph(
            "Reported over estimated seconds", "none",
            Query(quantile(0.1, "broker_estimate_error_ratio", "direction"), "{{direction}} p10"),
            Query(quantile(0.5, "broker_estimate_error_ratio", "direction"), "{{direction}} p50"),
            Query(quantile(0.9, "broker_estimate_error_ratio", "direction"), "{{direction}} p90"),
        ),
        graph(
            "Right within a factor of 2, over 1 h", "percentunit",
            Query(select(RIGHT), "{{direction}}"), most=1,
        ),
        graph("Estimated seconds", "s", *halves("broker_estimated_seconds", "direction", "{{direction}}")),
        graph("Reported seconds", "s", *halves("broker_reported_seconds", "direction", "{{direction}}")),
        graph("Reports", "reqps", Query(rate("broker_reports_total", "outcome"), "{{outcome}}"), stacked=True),
        graph(
            "Reports that tell of failures", "reqps",
            Query(rate("broker_reports_total", "store, outcome", 'outcome!="ok"'), "{{store}} {{outcome}}"),
        ),
        graph(
            "Counted instead of a report", "reqps", Query(rate("broker_signals_total", "kind"), "{{kind}}"),
            text="repeated: a client asked for the same blob again; expired: a ticket ended without a word; committed: an upload's time.",
        ),
        graph(
            "Time until every broker knew of a failure", "s", *halves("broker_failure_spread_seconds", "outcome", "{{outcome}}"),
            text="The report is answered only then; late ones were not waited for any longer.",
        ),
    ),
)  # fmt: skip

STORES = Board(
    "broker-stores",
    "Transfer broker: stores",
    (
        graph(
            "Slots used", "percentunit", Query(select("job_store_direction:broker_slots_used:ratio"), STORE), most=1,
            text="Leases over slots; stores without limits have neither.",
        ),
        graph(
            "Leases and slots", "none", Query(level("broker_leases", BOTH), STORE),
            Query(level("broker_slots", BOTH), "{{store}} {{direction}} slots"),
        ),
        graph(
            "Leases refused", "reqps", Query(rate("broker_leases_refused_total", BOTH), STORE),
            text="Asked for when every slot was taken; another store may have taken the transfer.",
        ),
        graph(
            "Bytes that clients reported", "Bps",
            Query(rate("broker_reported_bytes_total", BOTH), STORE), stacked=True,
        ),
        graph(
            "Bandwidth used, over 5 min", "percentunit",
            Query(select("job_store_direction:broker_bandwidth_used:ratio_rate5m"), STORE),
            text="Bytes that clients reported over the bandwidth that the store declares. Bytes count when they are reported, at the end.",
        ),
        graph("Bandwidth declared", "Bps", Query(level("broker_bandwidth_bytes_per_second", BOTH), STORE)),
        graph("Space used", "percentunit", Query(select("job_store:broker_space_used:ratio"), "{{store}}"), most=1),
        graph(
            "Space", "bytes", Query(level("broker_space_taken_bytes", "store"), "{{store}} taken"),
            Query(level("broker_space_capacity_bytes", "store"), "{{store}} capacity"),
            text="Replicas and the reservations of open uploads.",
        ),
        graph(
            "Transfers that failed, over 5 min", "percentunit", Query(select("job_store:broker_reports_failed:ratio_rate5m"), "{{store}}"),
            text="As clients reported.", most=1,
        ),
        graph(
            "Suspicion", "percentunit", Query(level("broker_suspicion", BOTH), STORE), most=1,
            text="How far a store is doubted for everyone, after independent clients failed there; missing while it is not.",
        ),
        graph(
            "Clients kept away after a failure", "none", Query(level("broker_failures", "store"), "{{store}}"),
            text="Each for a minute, from the store that failed it.",
        ),
        graph(
            "The broker's own requests that failed, over 5 min", "percentunit",
            Query(select("job_store:broker_store_requests_failed:ratio_rate5m"), "{{store}}"), most=1,
        ),
        graph(
            "The broker's own requests", "reqps",
            Query(rate("broker_store_requests_total", "store, method, outcome"), "{{store}} {{method}} {{outcome}}"),
        ),
        graph("Time of the broker's own requests", "s", *halves("broker_store_request_seconds", "store", "{{store}}")),
    ),
)  # fmt: skip

HELD = level("broker_project_leases", "project")

FAIRNESS = Board(
    "broker-fairness",
    "Transfer broker: fairness among projects",
    (
        stat(
            "Fairness, 10 min", "none", select("job:broker_contending_leases:fairness10m"),
            "Jain's index over the projects that waited: 1 when they held as many leases, 1/n when one of n held all. "
            "Weights and priorities of roles make it smaller.",
        ),
        stat("Projects with leases", "none", f"count({HELD} > 0)"),
        stat("Fullest store", "percentunit", f"max({select('job_store_direction:broker_slots_used:ratio')})"),
        graph(
            "Leases by project", "none", Query(HELD, "{{project}}"), stacked=True,
            text="The 20 projects that hold most; the others are added up under no name.",
        ),
        graph(
            "Leases by project, mean of 10 min", "none", Query(select("job_project:broker_project_leases:avg10m"), "{{project}}"),
        ),
        graph("Fairness", "none", Query(select("job:broker_contending_leases:fairness10m"), "Jain's index"), most=1),
        graph(
            "Requests that wait, by project", "none", Query(level("broker_project_waiting", "project"), "{{project}}"), stacked=True,
        ),
        graph(
            "Leases of those that waited, mean of 10 min", "none",
            Query(select("job_project:broker_contending_leases:avg10m"), "{{project}}"),
        ),
        graph(
            "Requests that wait", "none", Query(total("broker_waiting", BOTH), STORE),
            text="For a slot; one that waits for several stores counts at each.",
        ),
        graph("Time that requests waited", "s", *halves("broker_wait_seconds", "outcome", "{{outcome}}")),
        graph("Refused for their project's quota", "reqps", Query(rate("broker_quota_refusals_total", "operation"), "{{operation}}")),
        graph(
            "Seconds until a slot over Retry-After", "none",
            Query(quantile(0.1, "broker_retry_after_ratio", "how"), "{{how}} p10"),
            Query(quantile(0.5, "broker_retry_after_ratio", "how"), "{{how}} p50"),
            Query(quantile(0.9, "broker_retry_after_ratio", "how"), "{{how}} p90"),
            text="1 is a promise that came true; above it the slot came later. Who returned never comes before its time.",
        ),
        graph(
            "Share of the largest project", "percentunit",
            Query(f"max({HELD}) / sum({HELD})", "largest"), most=1,
        ),
    ),
)  # fmt: skip

RATE, SUCCESS = "broker_path_rate_bytes_per_second", "broker_path_success_ratio"

PATHS = Board(
    "broker-paths",
    "Transfer broker: paths",
    (
        graph(
            "Rate, median site", "Bps", Query(path(RATE, "median"), STORE),
            text="Moving averages of what transfers reported. No label names a site; broker ls paths does.",
        ),
        graph(
            "Rate, worst site", "Bps", Query(path(RATE, "worst"), STORE),
        ),
        graph(
            "Rate, best site over worst", "none",
            Query(f"{path(RATE, 'best')} / {path(RATE, 'worst')}", STORE),
            text="How much it matters which site asks.",
        ),
        graph(
            "Success, worst site", "percentunit",
            Query(path(SUCCESS, "worst"), STORE), most=1,
        ),
        graph(
            "Success, median site", "percentunit",
            Query(path(SUCCESS, "median"), STORE), most=1,
        ),
        graph(
            "Sites that reported lately", "none", Query(level("broker_paths", BOTH), STORE),
            text="In the last 40 minutes. Ranking of stores that nobody reports on falls back to wider sites and to distance.",
        ),
    ),
)  # fmt: skip

UPLOADS = Board(
    "broker-uploads",
    "Transfer broker: uploads and replicas",
    (
        graph("Upload tickets", "reqps", Query(rate("broker_tickets_total", "outcome", 'operation="upload"'), "{{outcome}}"), stacked=True),
        graph("Uploads", "none", Query(level("broker_uploads", "state"), "{{state}}"), text="Ended ones are forgotten after a while."),
        graph(
            "Commits", "reqps", Query(rate("broker_http_requests_total", "status", 'operation="commitUpload"'), "{{status}}"), stacked=True,
            text="409: the store holds something else than was declared, or not yet all of it.",
        ),
        graph("Commits refused, over 15 min", "percentunit", Query(select("job:broker_uploads_refused:ratio_rate15m"), "refused"), most=1),
        graph("Time to commit", "s", *halves("broker_http_request_seconds", "", "commit", 'operation="commitUpload"'),
              text="Looks at the store twice, and seals in between."),
        graph(
            "Bytes that uploads reported", "Bps",
            Query(rate("broker_reported_bytes_total", "store", 'direction="write"'), "{{store}}"), stacked=True,
        ),
        graph("Images", "none", Query(level("broker_images", "status"), "{{status}}"), text="pending ones wait for approval."),
        stat("Longest wait for approval", "s", f"max({select('broker_vetting_waiting_seconds')})"),
        graph("Replicas", "none", Query(level("broker_replicas", "state"), "{{state}}")),
        graph("Copies", "none", Query(level("broker_copies", "state"), "{{state}}"),
              text="Those that agents are asked to make; seven days of ends."),
        graph("Objects to be removed", "none", Query(level("broker_deletions", "state"), "{{state}}"),
              text="waiting for their time, or failing: the store did not do it yet."),
    ),
)  # fmt: skip

DATABASE = Board(
    "broker-database",
    "Transfer broker: database and processes",
    (
        graph("Time of statements", "s", *halves("broker_database_seconds", "statement", "{{statement}}"),
              text="Waiting for a connection included."),
        graph("Slowest statements, p99 over 5 min", "s", Query(select("job_statement:broker_database_seconds:p99_5m"), "{{statement}}")),
        graph("Statements", "reqps", Query(rate("broker_database_seconds_count", "statement"), "{{statement}}")),
        graph("Requests that share a statement", "none", Query(mean("broker_coalesced_requests", "statement"), "{{statement}}"),
              text="Mean. It grows with load, and is why the database costs each request little."),
        graph("Requests that wait for the next statement", "none", Query(total("broker_queued_requests", "statement"), "{{statement}}")),
        graph("Connections", "none", Query(total("broker_database_connections", "state"), "{{state}}")),
        graph(
            "Connections used", "percentunit",
            Query(select("job_instance:broker_database_connections_used:ratio"), "{{instance}}"), most=1,
        ),
        graph("Size of the database", "bytes", Query(level("broker_database_bytes"), "size")),
        graph("Age of memory", "s", Query(level("broker_memory_age_seconds", "instance"), "{{instance}}"),
              text="Since the change log was last read: half a second when all is well. From 1.5 s on everything is looked up."),
        graph("Background work", "reqps", Query(rate("broker_jobs_total", "task, outcome"), "{{task}} {{outcome}}")),
        graph("Processor time", "percentunit", Query(rate("process_cpu_seconds_total", "instance"), "{{instance}}"),
              text="1 is one core; an installation with workers counts all of them."),
        graph("Memory", "bytes", Query(total("process_resident_memory_bytes", "instance"), "{{instance}}")),
        graph("Open files and connections", "none", Query(total("process_open_fds", "instance"), "{{instance}}"),
              Query(total("process_max_fds", "instance"), "{{instance}} limit")),
        graph("Versions", "none", Query(f"count by (version) ({select('broker_info')})", "{{version}}")),
    ),
)  # fmt: skip

ACCESS = Board(
    "broker-access",
    "Transfer broker: keys and refusals",
    (
        graph("Tokens refused", "reqps", Query(rate("broker_auth_failures_total", "reason"), "{{reason}}")),
        graph("Tokens not looked at", "reqps", Query(rate("broker_tokens_unchecked_total", "reason"), "{{reason}}"),
              text="After too many refused ones of one address, or of all."),
        graph("Signing keys", "none", Query(level("broker_signing_keys", "state"), "{{state}}")),
        graph("Answers 401, 403 and 429", "reqps",
              Query(rate("broker_http_requests_total", "status", 'status=~"401|403|429"'), "{{status}}")),
        graph("Connections", "none", Query(total("broker_http_connections", "instance"), "{{instance}}")),
        graph("Connections closed without an answer", "reqps", Query(rate("broker_http_refusals_total", "reason"), "{{reason}}")),
        graph("Tokens of Keystone", "reqps", Query(rate("broker_keystone_tokens_total", "outcome"), "{{outcome}}"),
              text="remembered ones cost nothing; the others were asked about."),
        graph("Time of requests to Keystone", "s", *halves("broker_keystone_request_seconds", "operation", "{{operation}}")),
    ),
)  # fmt: skip

BOARDS = (TICKETS, RANKING, STORES, FAIRNESS, PATHS, UPLOADS, DATABASE, ACCESS)
