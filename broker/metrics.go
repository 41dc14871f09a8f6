package broker

import (
	"errors"
	"fmt"
	"net/http"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"spectrum-os.org/broker/broker/api"
	"spectrum-os.org/broker/broker/ledger"
	"spectrum-os.org/broker/policy"
)

var pid = os.Getpid()

func asAPI(err error) (*api.Error, bool) { return errors.AsType[*api.Error](err) }

// metrics are the broker's, in Prometheus' base units. No label has a value that
// names one VM, grant, partition or person: there would be as many series as there
// ever were of these.
type metrics struct {
	registry *prometheus.Registry
	rows     []metricRow
	streams  api.StreamStats

	decisions *prometheus.HistogramVec
	failures  prometheus.Counter
	limited   prometheus.Counter
	applies   prometheus.Histogram
	cuts      prometheus.Histogram
	commits   prometheus.Histogram
	unwritten prometheus.Counter
	recorded  *prometheus.CounterVec
	meter     *meter
}

// metricRow is a metric's row in the reference.
type metricRow struct {
	name, kind, help string
	labels           []metricLabel
}

// metricLabel is a label with all the values that it can have.
type metricLabel struct {
	name   string
	values []string
}

func (l metricLabel) names() []string { return []string{l.name} }

// Buckets, in seconds: of what a process does by itself, of what a disk does, and
// of what waits for a guest.
var (
	quickBuckets = prometheus.ExponentialBuckets(50e-6, 2, 14)
	diskBuckets  = prometheus.ExponentialBuckets(100e-6, 2, 16)
	guestBuckets = prometheus.ExponentialBuckets(0.01, 2, 13)
)

func newMetrics(b *Broker) *metrics {
	m := &metrics{registry: prometheus.NewRegistry()}
	m.registry.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))

	outcome := metricLabel{"outcome", []string{"allow", "deny", "ask", "refused"}}
	m.decisions = prometheus.NewHistogramVec(m.histogram("spectrum_decision_seconds",
		"From a request to the engines' verdict, by outcome; refused: before policy was asked.", quickBuckets, outcome), outcome.names())
	m.failures = m.counter("spectrum_policy_failures_total", "Decisions that came to deny because an engine could not decide.")
	m.limited = m.counter("spectrum_guest_requests_limited_total", "Requests of guests that were refused because the VM asks too often.")
	m.applies = prometheus.NewHistogram(m.histogram("spectrum_grant_apply_seconds", "From a recorded grant to the guest having it.", guestBuckets))
	m.cuts = prometheus.NewHistogram(m.histogram("spectrum_revocation_seconds", "From a request to revoke to all access being cut.", guestBuckets))
	m.commits = prometheus.NewHistogram(m.histogram("spectrum_ledger_commit_seconds", "Writing a transaction of the ledger and making it durable.", diskBuckets))
	m.unwritten = m.counter("spectrum_ledger_commit_failures_total", "Transactions that could not be written to the ledger.")
	var types []string
	for _, t := range ledger.EventTypes() {
		types = append(types, string(t))
	}
	slices.Sort(types)
	typ := metricLabel{"type", types}
	m.recorded = prometheus.NewCounterVec(prometheus.CounterOpts(
		m.row("spectrum_ledger_events_recorded_total", "counter", "Events recorded since the broker started, by type.", typ)), typ.names())
	for _, t := range types {
		m.recorded.WithLabelValues(t) // so that a rate has something to start from
	}
	m.registry.MustRegister(m.decisions, m.applies, m.cuts, m.commits, m.recorded)

	m.gauge("spectrum_vms_running", "VMs that run.", func() float64 { return float64(len(b.units())) })
	m.gauge("spectrum_ledger_last_sequence_number", "Number of the ledger's newest event.", func() float64 {
		seq, _ := b.ledger.Head()
		return float64(seq)
	})
	m.gauge("spectrum_ledger_size_bytes", "What the ledger's files take on the disk.", func() float64 { return float64(b.ledger.Size()) })
	m.gauge("spectrum_ledger_writable", "1 while the ledger can be written, else 0.", func() float64 {
		if b.ledger.Trouble() != nil {
			return 0
		}
		return 1
	})
	m.gauge("spectrum_event_streams_open", "Event streams that are followed now.", func() float64 { return float64(m.streams.Open()) })
	m.count("spectrum_event_streams_cut_total", "Event streams that were cut off because their reader was too slow.",
		func() float64 { return float64(m.streams.Cut()) })
	m.reconciler(b)
	m.grants(b)
	m.engines(b)
	return m
}

// grants are the metrics that one look at the ledger gives.
func (m *metrics) grants(b *Broker) {
	states := metricLabel{"state", []string{string(ledger.Pending), string(ledger.Active), string(ledger.Revoking)}}
	byState := m.desc("spectrum_grants", "gauge", "Grants that have not ended for good, by state; revoking: their revocation is under way.", states)
	oldest := m.desc("spectrum_oldest_revocation_age_seconds", "gauge", "For how long the oldest revocation has been under way; 0: there is none.")
	m.registry.MustRegister(collector{[]*prometheus.Desc{byState, oldest}, func(out chan<- prometheus.Metric) {
		var t ledger.Tally
		b.ledger.View(func(s *ledger.State) { t = s.Tally() })
		for _, state := range states.values {
			out <- prometheus.MustNewConstMetric(byState, prometheus.GaugeValue, float64(t.States[ledger.GrantState(state)]), state)
		}
		age := time.Duration(0)
		if !t.OldestRevoking.IsZero() {
			age = max(0, b.o.Clock.Now().Wall.Sub(t.OldestRevoking))
		}
		out <- prometheus.MustNewConstMetric(oldest, prometheus.GaugeValue, age.Seconds())
	}})
}

// engines is how many policies are in which state.
func (m *metrics) engines(b *Broker) {
	states := metricLabel{"state", []string{"loaded", "stale", "none"}}
	desc := m.desc("spectrum_policy_engines", "gauge", "Policies by state; stale: the last good one is in force; none: everything is denied.", states)
	m.registry.MustRegister(collector{[]*prometheus.Desc{desc}, func(out chan<- prometheus.Metric) {
		n := map[string]int{}
		for _, e := range b.policyStatus().Engines {
			n[e.State]++
		}
		for _, state := range states.values {
			out <- prometheus.MustNewConstMetric(desc, prometheus.GaugeValue, float64(n[state]), state)
		}
	}})
}

// collector computes metrics when they are asked for.
type collector struct {
	descs   []*prometheus.Desc
	collect func(chan<- prometheus.Metric)
}

func (c collector) Describe(out chan<- *prometheus.Desc) {
	for _, d := range c.descs {
		out <- d
	}
}

func (c collector) Collect(out chan<- prometheus.Metric) { c.collect(out) }

// row puts a metric into the reference.
func (m *metrics) row(name, kind, help string, labels ...metricLabel) prometheus.Opts {
	m.rows = append(m.rows, metricRow{name, kind, help, labels})
	return prometheus.Opts{Name: name, Help: help}
}

func (m *metrics) histogram(name, help string, buckets []float64, labels ...metricLabel) prometheus.HistogramOpts {
	o := m.row(name, "histogram", help, labels...)
	return prometheus.HistogramOpts{Name: o.Name, Help: o.Help, Buckets: buckets}
}

func (m *metrics) counter(name, help string) prometheus.Counter {
	c := prometheus.NewCounter(prometheus.CounterOpts(m.row(name, "counter", help)))
	m.registry.MustRegister(c)
	return c
}

func (m *metrics) gauge(name, help string, value func() float64) {
	m.registry.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts(m.row(name, "gauge", help)), value))
}

func (m *metrics) count(name, help string, value func() float64) {
	m.registry.MustRegister(prometheus.NewCounterFunc(prometheus.CounterOpts(m.row(name, "counter", help)), value))
}

func (m *metrics) desc(name, kind, help string, labels ...metricLabel) *prometheus.Desc {
	o := m.row(name, kind, help, labels...)
	var names []string
	for _, l := range labels {
		names = append(names, l.name)
	}
	return prometheus.NewDesc(o.Name, o.Help, names, nil)
}

// MetricsReference is the page of the metrics, in Markdown, without a title.
func MetricsReference() string {
	var s strings.Builder
	s.WriteString("| metric | type | meaning | labels |\n|---|---|---|---|\n")
	rows := newMetrics(&Broker{}).rows
	slices.SortFunc(rows, func(x, y metricRow) int { return strings.Compare(x.name, y.name) })
	for _, r := range rows {
		var labels []string
		for _, l := range r.labels {
			labels = append(labels, fmt.Sprintf("`%s`: `%s`", l.name, strings.Join(l.values, "`, `")))
		}
		fmt.Fprintf(&s, "| `%s` | %s | %s | %s |\n", r.name, r.kind, r.help, strings.Join(labels, "; "))
	}
	return s.String()
}

func (m *metrics) handler() http.Handler {
	return promhttp.HandlerFor(m.registry, promhttp.HandlerOpts{})
}

func (m *metrics) decided(v policy.Verdict, d time.Duration) {
	outcome := string(v.Outcome)
	if outcome == "" {
		outcome = "refused" // before policy was asked
	}
	m.decisions.WithLabelValues(outcome).Observe(d.Seconds())
	if slices.ContainsFunc(v.Answers, func(a policy.Answer) bool { return a.Outcome == policy.Error }) {
		m.failures.Inc()
	}
}

func (m *metrics) applied(d time.Duration) { m.applies.Observe(d.Seconds()) }

func (m *metrics) cut(d time.Duration) { m.cuts.Observe(d.Seconds()) }

// committed is told of every transaction of the ledger.
func (m *metrics) committed(c ledger.Commit) {
	if c.Err != nil {
		m.unwritten.Inc()
		return
	}
	m.commits.Observe(c.Took.Seconds())
	for _, e := range c.Events {
		m.recorded.WithLabelValues(string(e.Type)).Inc()
	}
}
