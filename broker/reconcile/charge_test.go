package reconcile

import (
	"context"
	"errors"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/uuid"

	"spectrum-os.org/broker/broker/ledger"
)

// full is a ledger that can be written or not.
type full struct {
	*ledger.Ledger
	is atomic.Bool
}

func (f *full) Update(ctx context.Context, fn func(tx *ledger.Tx) error) ([]ledger.Event, error) {
	if f.is.Load() {
		return nil, errors.New("no space left on device")
	}
	return f.Ledger.Update(ctx, fn)
}

func counted(uses int) func(*ledger.GrantRecord) {
	return func(r *ledger.GrantRecord) { r.Limits.MaxUses = &uses }
}

// again is another reconciler on the same ledger and world, whose VM is in run.
func (g *rig) again(l Ledger, run string) {
	g.r.Close()
	g.r = New(Options{
		Appliers: []Applier{g.p}, Ledger: l, Clock: g.clock, Sweep: 20 * time.Millisecond,
		Instances: func() map[uuid.UUID]string { return map[uuid.UUID]string{g.vm: run} },
	})
}

func (g *rig) look(id uuid.UUID) (out ledger.Grant) {
	g.l.View(func(s *ledger.State) { out, _ = s.Grant(id) })
	return out
}

// Who dies between the charge and the application has spent the use: for the same
// run it is not charged again, and for another one there is none.
func TestCrashBetweenChargeAndApply(t *testing.T) {
	for name, c := range map[string]struct {
		run  string
		want ledger.GrantState
	}{"the same run goes on": {"run", ledger.Active}, "another run began": {"run-2", ledger.Failed}} {
		t.Run(name, func(t *testing.T) {
			g := newRig(t)
			g.p.hold = make(chan struct{})
			id := g.grant(func(r *ledger.GrantRecord) {
				counted(1)(r)
				r.Persist, r.Instance = true, ""
			})
			<-g.p.began // charged, and not made
			if got := g.look(id); got.Uses != 1 || got.State != ledger.Pending {
				t.Fatalf("%d uses, %s", got.Uses, got.State)
			}
			closed := make(chan struct{})
			go func() { defer close(closed); g.r.Close() }()
			time.Sleep(10 * time.Millisecond)
			g.p.mu.Lock()
			close(g.p.hold)
			g.p.hold = nil
			g.p.mu.Unlock()
			<-closed
			g.p.mu.Lock()
			clear(g.p.objects) // what it was making is not there
			g.p.mu.Unlock()
			g.again(g.l, c.run)
			g.r.Wake(g.vm)
			got := g.await(id, c.want)
			if got.Uses != 1 {
				t.Errorf("%d uses were charged", got.Uses)
			}
			if made := g.p.count(); (made == 1) != (c.want == ledger.Active) {
				t.Errorf("%d objects are there", made)
			}
			if c.want == ledger.Failed && (!strings.Contains(got.Reason, "no use of it is left") || !errors.Is(g.r.Failure(id), ErrUsedUp)) {
				t.Errorf("it failed because %q (%v)", got.Reason, g.r.Failure(id))
			}
		})
	}
}

// What cannot be charged is not given, and is once it can be.
func TestUseThatCannotBeRecorded(t *testing.T) {
	g := newRig(t)
	f := &full{Ledger: g.l}
	f.is.Store(true)
	g.again(f, "run")
	id := g.grant(counted(1))
	time.Sleep(100 * time.Millisecond)
	if n := g.p.applied(); n != 0 {
		t.Fatalf("%d objects were made", n)
	}
	f.is.Store(false)
	if got := g.await(id, ledger.Active); got.Uses != 1 {
		t.Errorf("%d uses", got.Uses)
	}
}

// What has no limit is not charged, and costs no commit before it is made.
func TestUncountedUse(t *testing.T) {
	g := newRig(t)
	id := g.grant(nil)
	if got := g.await(id, ledger.Active); got.Uses != 0 {
		t.Errorf("%d uses", got.Uses)
	}
	events, err := g.l.Events(0, ledger.EventFilter{Types: []ledger.EventType{ledger.GrantUsed}}, 0)
	if err != nil || len(events) != 0 {
		t.Errorf("%d uses are on record, %v", len(events), err)
	}
}

// Siblings that share a budget: as many as it has, and the others fail by it.
func TestSiblingsShareABudget(t *testing.T) {
	g := newRig(t)
	parent := g.grant(counted(3))
	g.await(parent, ledger.Active)
	var ids []uuid.UUID
	for range 6 {
		// One that comes when nothing is left is not recorded at all.
		id := uuid.New()
		record := ledger.GrantRecord{Capability: g.c, Instance: "run", Parent: parent}
		counted(3)(&record)
		_, err := g.l.Update(t.Context(), func(tx *ledger.Tx) error {
			return tx.Append(ledger.NewGrant(ledger.Actor{Kind: ledger.ActorBroker}, id, g.vm, uuid.Nil, record))
		})
		if err == nil {
			ids = append(ids, id)
		} else if !errors.Is(err, ledger.ErrUsedUp) {
			t.Fatal(err)
		}
	}
	g.r.Wake(g.vm)
	active := 0
	for _, id := range ids {
		for end := time.Now().Add(10 * time.Second); g.look(id).State == ledger.Pending; time.Sleep(time.Millisecond) {
			if time.Now().After(end) {
				t.Fatal("it is still pending")
			}
		}
		switch got := g.look(id); {
		case got.State == ledger.Active:
			active++
		case got.State != ledger.Failed || !strings.Contains(got.Reason, parent.String()+": used up"):
			t.Errorf("%s: %s", got.State, got.Reason)
		}
	}
	if active != 2 || g.p.count() != 3 {
		t.Errorf("%d of a budget of 3, of which its parent used one; %d objects", active, g.p.count())
	}
}
