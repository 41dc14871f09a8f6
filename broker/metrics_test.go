package broker

import (
	"context"
	"errors"
	"io"
	"math"
	"net/http/httptest"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil"
	dto "github.com/prometheus/client_model/go"

	"spectrum-os.org/broker/broker/ledger"
	"spectrum-os.org/broker/policy"
)

// identifier fits whatever there can be without end: ids and their first digits,
// numbers, paths.
var identifier = regexp.MustCompile(`[0-9a-f]{8}|[0-9]{3}|/`)

// measured gathers the broker's own metrics by name.
func measured(t *testing.T, m *metrics) map[string]*dto.MetricFamily {
	t.Helper()
	families, err := m.registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	out := map[string]*dto.MetricFamily{}
	for _, f := range families {
		if strings.HasPrefix(f.GetName(), "spectrum_") {
			out[f.GetName()] = f
		}
	}
	return out
}

// valueOf is a metric's value, or how often a histogram was observed.
func valueOf(t *testing.T, m *metrics, name string, labels ...string) float64 {
	t.Helper()
	f, ok := measured(t, m)[name]
	if !ok {
		t.Fatalf("there is no metric %s", name)
	}
	for _, one := range f.GetMetric() {
		fits := true
		for _, l := range one.GetLabel() {
			fits = fits && slices.Contains(labels, l.GetValue())
		}
		if fits {
			switch {
			case one.Histogram != nil:
				return float64(one.GetHistogram().GetSampleCount())
			case one.Counter != nil:
				return one.GetCounter().GetValue()
			}
			return one.GetGauge().GetValue()
		}
	}
	t.Fatalf("%s has nothing with the labels %v", name, labels)
	return math.NaN()
}

// TestMetrics holds what a broker that did everything tells against the names,
// units and labels that are promised.
func TestMetrics(t *testing.T) {
	g := newGranting(t, allowsAll, "package spectrum.grant\n\nallow if input.capability.resource.path != \"/no\"\n")
	first := g.granted(mail1, "/a")
	g.granted(mail1, "/b")
	_, _ = g.grant(t.Context(), g.asks(mail1, "/no"))
	if _, err := g.revoke(t.Context(), brokerActor, only(first.ID), "enough", true); err != nil {
		t.Fatal(err)
	}
	g.quotas = quotas{perMinute: 1, burst: 1}
	g.o.GuestRequests = 1
	for range 3 {
		_ = guestService{g.Broker}.mayRecord(t.Context(), mail1)
	}
	g.metrics.decided(policy.Verdict{Outcome: policy.Deny, Answers: []policy.Answer{{Outcome: policy.Error}}}, time.Millisecond)
	if _, err := g.ledger.Update(t.Context(), func(*ledger.Tx) error { return errors.New("no") }); err == nil {
		t.Fatal("an update that failed did not")
	}

	head, _ := g.ledger.Head()
	for _, c := range []struct {
		name   string
		labels []string
		want   float64
	}{
		{"spectrum_grants", []string{"active"}, 1},
		{"spectrum_grants", []string{"revoking"}, 0},
		{"spectrum_oldest_revocation_age_seconds", nil, 0},
		{"spectrum_ledger_events_recorded_total", []string{"grant.requested"}, 2},
		{"spectrum_ledger_events_recorded_total", []string{"grant.revoked"}, 1},
		{"spectrum_ledger_events_recorded_total", []string{"grant.denied"}, 1},
		{"spectrum_ledger_events_recorded_total", []string{"vm.exited"}, 0},
		{"spectrum_ledger_last_sequence_number", nil, float64(head)},
		{"spectrum_ledger_writable", nil, 1},
		{"spectrum_ledger_commit_failures_total", nil, 0},
		{"spectrum_decision_seconds", []string{"allow"}, 2},
		{"spectrum_policy_failures_total", nil, 1},
		{"spectrum_policy_engines", []string{"loaded"}, 3},
		{"spectrum_guest_requests_limited_total", nil, 2},
		{"spectrum_vms_running", nil, 2},
	} {
		if got := valueOf(t, g.metrics, c.name, c.labels...); got != c.want {
			t.Errorf("%s%v is %v, want %v", c.name, c.labels, got, c.want)
		}
	}
	if got := valueOf(t, g.metrics, "spectrum_ledger_size_bytes"); got < 4096 {
		t.Errorf("the ledger is said to take %v bytes", got)
	}
	if n, events := valueOf(t, g.metrics, "spectrum_ledger_commit_seconds"), float64(head); n == 0 || n > events {
		t.Errorf("%v commits of %v events are measured", n, events)
	}

	problems, err := testutil.GatherAndLint(g.metrics.registry)
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range problems {
		if strings.HasPrefix(p.Metric, "spectrum_") {
			t.Errorf("%s: %s", p.Metric, p.Text)
		}
	}

	families := measured(t, g.metrics)
	for name, f := range families {
		i := slices.IndexFunc(g.metrics.rows, func(r metricRow) bool { return r.name == name })
		if i < 0 {
			t.Errorf("%s is in no row of the reference", name)
			continue
		}
		row := g.metrics.rows[i]
		if kind := strings.ToLower(f.GetType().String()); kind != row.kind || f.GetHelp() != row.help {
			t.Errorf("%s is a %s (%s) and documented as a %s (%s)", name, kind, f.GetHelp(), row.kind, row.help)
		}
		for _, one := range f.GetMetric() {
			for _, l := range one.GetLabel() {
				known := slices.ContainsFunc(row.labels, func(k metricLabel) bool {
					return k.name == l.GetName() && slices.Contains(k.values, l.GetValue())
				})
				if !known || identifier.MatchString(l.GetValue()) {
					t.Errorf("%s has the label %s=%q, which is none of what it may have", name, l.GetName(), l.GetValue())
				}
			}
		}
	}
	for _, r := range g.metrics.rows {
		if families[r.name] == nil {
			t.Errorf("%s is documented and not there", r.name)
		}
		if !strings.Contains(MetricsReference(), "| `"+r.name+"` | "+r.kind+" | "+r.help+" |") {
			t.Errorf("%s is not in the reference", r.name)
		}
	}

	w := httptest.NewRecorder()
	g.metrics.handler().ServeHTTP(w, httptest.NewRequestWithContext(t.Context(), "GET", "/", nil))
	text, _ := io.ReadAll(w.Result().Body)
	for _, secret := range []string{first.ID.String(), mail1.String(), workID.String()} {
		if strings.Contains(string(text), secret[:8]) {
			t.Errorf("the metrics name %s", secret)
		}
	}
}

// A revocation that does not get done is told by its age.
func TestOldestRevocation(t *testing.T) {
	g := newGranting(t, allowsAll, allowsAll)
	made := g.granted(mail1, "/a")
	g.reconciler.Close() // nobody withdraws
	g.append(ledger.NewChange(ledger.GrantRevoking, brokerActor, made.ID, ledger.Change{}))
	time.Sleep(20 * time.Millisecond)
	if n := valueOf(t, g.metrics, "spectrum_grants", "revoking"); n != 1 {
		t.Errorf("%v revocations are under way", n)
	}
	if age := valueOf(t, g.metrics, "spectrum_oldest_revocation_age_seconds"); age < 0.02 || age > 60 {
		t.Errorf("the oldest is under way for %v s", age)
	}
	// The same after a restart.
	if err := g.ledger.Reopen(context.Background()); err != nil {
		t.Fatal(err)
	}
	if age := valueOf(t, g.metrics, "spectrum_oldest_revocation_age_seconds"); age < 0.02 {
		t.Errorf("after the ledger was read again it is under way for %v s", age)
	}
}
