package broker

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"spectrum-os.org/broker/broker/reconcile"
)

// meter is what the reconciler tells of itself.
type meter struct {
	passes   *prometheus.HistogramVec
	failures *prometheus.CounterVec
}

var _ reconcile.Meter = (*meter)(nil)

// Passed implements reconcile.Meter.
func (m *meter) Passed(lane string, took time.Duration) {
	m.passes.WithLabelValues(lane).Observe(took.Seconds())
}

// Failed implements reconcile.Meter.
func (m *meter) Failed(kind, verb string) { m.failures.WithLabelValues(kind, verb).Inc() }

// reconciler are the metrics of what the reconciler does.
func (m *metrics) reconciler(b *Broker) {
	verbs := metricLabel{"verb", []string{string(reconcile.Apply), string(reconcile.Extend), string(reconcile.Withdraw), string(reconcile.Release)}}
	failed := metricLabel{"verb", append([]string{"observe"}, verbs.values...)}
	kinds := metricLabel{"kind", []string{"fs"}}
	lanes := metricLabel{"lane", []string{"withdraw", "apply"}}
	m.meter = &meter{
		passes: prometheus.NewHistogramVec(m.histogram("spectrum_reconcile_pass_seconds",
			"One comparison of what a VM has with what it should have; what it begins is not part of it.", quickBuckets, lanes), lanes.names()),
		failures: prometheus.NewCounterVec(prometheus.CounterOpts(m.row("spectrum_reconcile_failures_total", "counter",
			"Steps that failed, for good or to be tried again; observe: the VM could not be looked at.", kinds, failed)), []string{"kind", "verb"}),
	}
	for _, kind := range kinds.values {
		for _, verb := range failed.values {
			m.meter.failures.WithLabelValues(kind, verb) // so that a rate has something to start from
		}
	}
	m.registry.MustRegister(m.meter.passes, m.meter.failures)
	desc := m.desc("spectrum_objects_backing_off", "gauge", "Objects for which something failed and is tried again, by what it is.", verbs)
	m.registry.MustRegister(collector{[]*prometheus.Desc{desc}, func(out chan<- prometheus.Metric) {
		n := b.reconciler.Troubles()
		for _, verb := range verbs.values {
			out <- prometheus.MustNewConstMetric(desc, prometheus.GaugeValue, float64(n[reconcile.Verb(verb)]), verb)
		}
	}})
}
