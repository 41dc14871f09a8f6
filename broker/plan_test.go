package broker

import (
	"fmt"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"spectrum-os.org/broker/broker/api"
	"spectrum-os.org/broker/broker/ledger"
	"spectrum-os.org/broker/broker/reconcile"
)

// until waits for what the reconciler brings about by itself.
func until(t *testing.T, what string, is func() bool) {
	t.Helper()
	for end := time.Now().Add(20 * time.Second); !is(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("never: %s", what)
		}
	}
}

// What cannot be made just now is in the plan, in the list, in health and in the
// metrics, and in the answer to who waits for it; another VM's grant is made
// meanwhile, and when it works nothing is left to do.
func TestPlanShowsWhatDoesNotWork(t *testing.T) {
	g := newGranting(t, allowsAll, allowsAll)
	var down atomic.Bool
	down.Store(true)
	g.things.fails = func(o reconcile.Object) error {
		if down.Load() && o.VM == mail1 {
			return fmt.Errorf("the shim does not answer: %w", reconcile.ErrTransient)
		}
		return nil
	}
	if p, err := g.Plan(t.Context(), ""); err != nil || len(p.VMs) != 0 {
		t.Fatalf("with nothing to do the plan is %+v, %v", p, err)
	}
	_, err := g.Grant(t.Context(), api.Caller{Kind: api.CallerPerson, UID: 1000}, api.GrantRequest{
		VM: mail1.String(), Capability: "fs:ro:" + workID.String() + ":/docs", Wait: true, TimeoutSeconds: 1,
	})
	e, ok := asAPI(err)
	if !ok || e.Code != api.CodeTimeout || e.Grant == nil || e.Grant.Trouble == nil || !strings.Contains(e.Detail, "not applied yet: the shim does not answer") {
		t.Fatalf("the answer is %v; want that it is not applied yet, and why", err)
	}
	id := e.Grant.ID
	var p api.Plan
	until(t, "more than one try", func() bool {
		if p, err = g.Plan(t.Context(), mail1.String()); err != nil || len(p.VMs) != 1 || len(p.VMs[0].Steps) != 1 {
			t.Fatalf("the plan is %+v, %v; want one step in one VM", p, err)
		}
		step := p.VMs[0].Steps[0]
		return step.Trouble != nil && step.Trouble.Attempts > 1
	})
	step := p.VMs[0].Steps[0]
	if step.Verb != "apply" || len(step.Grants) != 1 || step.Grants[0] != id || step.Why != "a live grant needs it" ||
		!strings.HasPrefix(step.Trouble.Error, "the shim does not answer") || step.Trouble.Since.IsZero() {
		t.Errorf("the step is %+v, %+v", step, step.Trouble)
	}
	if p, err := g.Plan(t.Context(), mail2.String()); err != nil || len(p.VMs) != 0 {
		t.Errorf("the other VM's plan is %+v, %v; want nothing", p, err)
	}
	g.granted(mail2, "/docs")
	grants, err := g.ListGrants(t.Context(), api.GrantFilter{VM: mail1.String()})
	if err != nil || len(grants) != 1 || grants[0].State != api.GrantPending || grants[0].Trouble == nil || grants[0].Trouble.Verb != "apply" {
		t.Errorf("the list is %+v, %v; want a pending grant with its trouble", grants, err)
	}
	if h := g.Health(t.Context()); h.Status == "degraded" || !strings.Contains(strings.Join(h.Problems, "\n"), "cannot be made just now: 1 objects; cannot be taken away: 0") {
		t.Errorf("health is %+v", h)
	}
	if n := g.reconciler.Troubles()[reconcile.Apply]; n != 1 {
		t.Errorf("%d objects are tried again, want 1", n)
	}
	if n := valueOf(t, g.metrics, "spectrum_objects_backing_off", "apply"); n != 1 {
		t.Errorf("the metrics tell of %v objects that are tried again", n)
	}
	if n := valueOf(t, g.metrics, "spectrum_reconcile_failures_total", "fs", "apply"); n < 2 {
		t.Errorf("the metrics tell of %v failures", n)
	}
	down.Store(false)
	g.awaitState(id, ledger.Active)
	until(t, "nothing to do", func() bool {
		p, err := g.Plan(t.Context(), "")
		return err == nil && len(p.VMs) == 0
	})
	if got, err := g.ShowGrant(t.Context(), id.String()); err != nil || got.Trouble != nil {
		t.Errorf("it is shown with trouble %+v, %v", got.Trouble, err)
	}
}

// A grant that persists waits for its VM, which is nothing to do.
func TestPlanShowsWhatWaits(t *testing.T) {
	g := newGranting(t, allowsAll, allowsAll)
	g.vanish(mail1)
	made, err := g.grant(t.Context(), g.asks(mail1, "/docs", persists))
	if err != nil {
		t.Fatal(err)
	}
	p, err := g.Plan(t.Context(), "")
	if err != nil || len(p.VMs) != 1 || len(p.VMs[0].Steps) != 0 || len(p.VMs[0].Waits) != 1 {
		t.Fatalf("the plan is %+v, %v; want one wait", p, err)
	}
	if w := p.VMs[0].Waits[0]; w.Verb != "wait" || w.Why != "its VM does not run" || len(w.Grants) != 1 || w.Grants[0] != made.ID {
		t.Errorf("it waits: %+v", w)
	}
	if _, err := g.Plan(t.Context(), "nobody"); api.CodeOf(err) != api.CodeNotFound {
		t.Errorf("the plan of a VM that is not there: %v", err)
	}
}
