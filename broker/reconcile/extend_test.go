package reconcile

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"

	"spectrum-os.org/broker/broker/ledger"
	"spectrum-os.org/broker/capabilities"
)

// movable is a place whose objects can be given a later deadline.
type movable struct {
	*place
	told chan Object // receives what is extended
	fail []error     // of the next extensions, guarded by place.mu
}

func (m *movable) Extend(_ context.Context, o Object) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if len(m.fail) > 0 {
		err := m.fail[0]
		m.fail = m.fail[1:]
		return err
	}
	seen, ok := m.objects[o.ID]
	switch {
	case !ok:
		return ErrTooLate
	case o.Generation < seen.Generation || o.Generation <= m.barred[o.ID]:
		return errors.New("an older generation")
	}
	seen.Generation, seen.Deadline = o.Generation, o.Deadline
	m.objects[o.ID] = seen
	m.told <- o
	return nil
}

func (m *movable) Apply(ctx context.Context, o Object) (string, error) {
	note, err := m.place.Apply(ctx, o)
	m.mu.Lock()
	defer m.mu.Unlock()
	if seen, ok := m.objects[o.ID]; ok && err == nil {
		seen.Deadline = o.Deadline
		m.objects[o.ID] = seen
	}
	return note, err
}

// newMovableRig is a rig whose objects can be extended. The reconciler of a rig
// that has none is replaced.
func newMovableRig(t *testing.T) (*rig, *movable) {
	t.Helper()
	g := newRig(t)
	m := &movable{place: g.p, told: make(chan Object, 16)}
	g.restart(m)
	return g, m
}

// restart is another broker on the same ledger, in the same world.
func (g *rig) restart(a Applier) {
	g.r.Close()
	o := g.r.o
	o.Appliers = []Applier{a}
	g.r = New(o)
}

func (g *rig) leased(ttl time.Duration) func(*ledger.GrantRecord) {
	return func(r *ledger.GrantRecord) { r.Deadline = capabilities.NewDeadline(g.clock.Now(), ttl) }
}

func (g *rig) renewal(id uuid.UUID, ttl time.Duration) (ledger.Event, capabilities.Deadline) {
	d := capabilities.NewDeadline(g.clock.Now(), ttl)
	return ledger.NewRenewal(ledger.Actor{Kind: ledger.ActorBroker}, id, ledger.RenewData{Deadline: d}), d
}

func (m *movable) wantTold(t *testing.T, id uuid.UUID, d capabilities.Deadline) {
	t.Helper()
	select {
	case o := <-m.told:
		if o.Generation != 2 || !o.Deadline.Equal(d) || len(o.Owners) != 1 || o.Owners[0] != id || o.Instance != "run" {
			t.Errorf("told of %+v, want the deadline %v", o, d)
		}
	case <-time.After(10 * time.Second):
		t.Fatal("nobody was told of the renewal")
	}
}

// TestRenewalIsTold wants a renewal to reach an object that stays the same
// thing, and to be planned no more once it has.
func TestRenewalIsTold(t *testing.T) {
	g, m := newMovableRig(t)
	id := g.grant(g.leased(time.Minute))
	g.await(id, ledger.Active)
	e, d := g.renewal(id, time.Hour)
	g.append(e)
	m.wantTold(t, id, d)
	if n := g.p.applied(); n != 1 {
		t.Errorf("it was made %d times", n)
	}
	if plan, err := g.r.Preview(t.Context(), g.vm); err != nil || len(plan) != 0 {
		t.Errorf("there is still to do: %v, %v", plan, err)
	}
	g.clock.Advance(59 * time.Minute)
	g.r.Wake(g.vm)
	g.await(id, ledger.Active)
	g.clock.Advance(time.Minute)
	g.r.Wake(g.vm)
	if got := g.await(id, ledger.Revoked); !strings.Contains(got.Reason, "expired") {
		t.Errorf("it ended because %q", got.Reason)
	}
}

// TestRenewalAfterACrash has the broker die when a renewal is on record and the
// world does not know of it.
func TestRenewalAfterACrash(t *testing.T) {
	g, m := newMovableRig(t)
	id := g.grant(g.leased(time.Minute))
	g.await(id, ledger.Active)
	g.r.Close()
	e, d := g.renewal(id, time.Hour)
	g.append(e)
	if plan, err := g.r.Preview(t.Context(), g.vm); err != nil || len(plan) != 1 ||
		plan[0].String() != fmt.Sprintf("extend o-%s (%s) on VM %s: its lease was renewed until %s", id, g.c, g.vm, d.Wall.Format(time.RFC3339)) {
		t.Errorf("the plan is %v, %v", plan, err)
	}
	g.restart(m)
	g.r.Wake(g.vm)
	m.wantTold(t, id, d)
	g.await(id, ledger.Active)
}

// TestRenewalTooLate has the object end by itself before it is told.
func TestRenewalTooLate(t *testing.T) {
	g, m := newMovableRig(t)
	id := g.grant(g.leased(time.Minute))
	g.await(id, ledger.Active)
	m.mu.Lock()
	m.fail = []error{fmt.Errorf("%w: its deadline came first", ErrTooLate)}
	m.mu.Unlock()
	e, _ := g.renewal(id, time.Hour)
	g.append(e)
	if got := g.await(id, ledger.Revoked); got.Reason != "its lease was renewed, but not in time for its VM: it had ended by then: its deadline came first" {
		t.Errorf("it ended because %q", got.Reason)
	}
	if n := g.p.count(); n != 0 {
		t.Errorf("%d objects are left", n)
	}
}

// TestRenewalWaitsForNothing: neither an application that hangs nor a
// withdrawal that does holds up a renewal, and a failure is tried again.
func TestRenewalWaitsForNothing(t *testing.T) {
	g, m := newMovableRig(t)
	id, stuck := g.grant(g.leased(time.Minute)), g.grant(nil)
	g.await(id, ledger.Active)
	g.await(stuck, ledger.Active)
	hold, held := make(chan struct{}), make(chan struct{})
	m.mu.Lock()
	m.hold = held
	m.stuck = map[string]chan struct{}{"o-" + stuck.String(): hold}
	m.fail = []error{errors.New("the shim does not answer")}
	m.mu.Unlock()
	defer close(held)
	g.grant(nil)
	<-m.began
	g.revoke(stuck)
	g.await(stuck, ledger.Revoking)
	e, d := g.renewal(id, time.Hour)
	g.append(e)
	m.wantTold(t, id, d)
	close(hold)
	g.await(stuck, ledger.Revoked)
}

// TestRenewalOfWhatCannotBeMoved: an applier that moves no deadlines applies
// again.
func TestRenewalOfWhatCannotBeMoved(t *testing.T) {
	g := newRig(t)
	id := g.grant(g.leased(time.Minute))
	g.await(id, ledger.Active)
	e, _ := g.renewal(id, time.Hour)
	g.append(e)
	for end := time.Now().Add(10 * time.Second); ; time.Sleep(2 * time.Millisecond) {
		g.p.mu.Lock()
		got := g.p.objects["o-"+id.String()].Generation
		g.p.mu.Unlock()
		if got == 2 {
			break
		}
		if time.Now().After(end) {
			t.Fatalf("it is there in generation %d", got)
		}
	}
}

// TestLeaseOfAnEarlierBoot: what ends an object by itself knows the machine's
// clocks only, so it is told this boot's time.
func TestLeaseOfAnEarlierBoot(t *testing.T) {
	g, m := newMovableRig(t)
	g.append(ledger.NewMark(ledger.Actor{Kind: ledger.ActorBroker}, g.clock.Now()))
	id := g.grant(func(r *ledger.GrantRecord) {
		r.Deadline = capabilities.NewDeadline(g.clock.Now(), time.Hour)
		r.Deadline.BootID = uuid.NewString()
	})
	g.await(id, ledger.Active)
	m.mu.Lock()
	defer m.mu.Unlock()
	if got, want := m.objects["o-"+id.String()].Deadline, capabilities.NewDeadline(g.clock.Now(), time.Hour); !got.Equal(want) {
		t.Errorf("it is told to end at %v, want %v", got, want)
	}
}
