package broker

import (
	"errors"
	"net/http"
	"os"
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

// metrics are the broker's, in Prometheus' base units.
type metrics struct {
	registry  *prometheus.Registry
	decisions *prometheus.HistogramVec
	applies   prometheus.Histogram
	cuts      prometheus.Histogram
}

func newMetrics(b *Broker) *metrics {
	m := &metrics{
		registry: prometheus.NewRegistry(),
		decisions: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "spectrum_decision_seconds", Help: "From a request to the engines' verdict, by outcome.",
			Buckets: prometheus.ExponentialBuckets(50e-6, 2, 14),
		}, []string{"outcome"}),
		applies: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name: "spectrum_grant_apply_seconds", Help: "From a recorded grant to the guest having it.",
			Buckets: prometheus.ExponentialBuckets(0.01, 2, 13),
		}),
		cuts: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name: "spectrum_revocation_seconds", Help: "From a request to revoke to all access being cut.",
			Buckets: prometheus.ExponentialBuckets(0.01, 2, 13),
		}),
	}
	m.registry.MustRegister(m.decisions, m.applies, m.cuts, collectors.NewGoCollector(),
		collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	gauge := func(name, help string, value func() float64) {
		m.registry.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: name, Help: help}, value))
	}
	gauge("spectrum_vms_running", "VMs that run.", func() float64 { return float64(len(b.units())) })
	gauge("spectrum_ledger_events", "Events in the ledger.", func() float64 { seq, _ := b.ledger.Head(); return float64(seq) })
	gauge("spectrum_ledger_writable", "1 while the ledger can be written, else 0.", func() float64 {
		if b.ledger.Poisoned() != nil {
			return 0
		}
		return 1
	})
	for _, state := range []ledger.GrantState{ledger.Pending, ledger.Active, ledger.Revoking} {
		m.registry.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Name: "spectrum_grants", Help: "Grants by state.", ConstLabels: prometheus.Labels{"state": string(state)},
		}, func() (n float64) {
			b.ledger.View(func(s *ledger.State) { n = float64(len(s.Grants(ledger.Filter{States: []ledger.GrantState{state}}))) })
			return n
		}))
	}
	return m
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
}

func (m *metrics) applied(d time.Duration) { m.applies.Observe(d.Seconds()) }

func (m *metrics) cut(d time.Duration) { m.cuts.Observe(d.Seconds()) }
