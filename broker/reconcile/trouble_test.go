package reconcile

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/uuid"

	"spectrum-os.org/broker/broker/ledger"
)

// meter counts what it is told.
type meter struct {
	mu     sync.Mutex
	failed map[string]int
	passes int
}

func (m *meter) Passed(string, time.Duration) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.passes++
}

func (m *meter) Failed(kind, verb string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.failed == nil {
		m.failed = map[string]int{}
	}
	m.failed[kind+" "+verb]++
}

func (m *meter) count(what string) int {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.failed[what]
}

// site is a world of many VMs in which each object is one grant's, and a test
// says what becomes of each call.
type site struct {
	place
	observes atomic.Int64
	// before is called before each step of an object, or look of a VM, and may
	// hang until ctx ends; its error is the outcome.
	mu     sync.Mutex
	before func(ctx context.Context, verb string, vm uuid.UUID, id string) error
}

func (s *site) step(ctx context.Context, verb string, vm uuid.UUID, id string) error {
	s.mu.Lock()
	before := s.before
	s.mu.Unlock()
	if before == nil {
		return nil
	}
	return before(ctx, verb, vm, id)
}

func (s *site) set(before func(ctx context.Context, verb string, vm uuid.UUID, id string) error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.before = before
}

func (s *site) Observe(ctx context.Context, vm uuid.UUID) ([]Observed, error) {
	s.observes.Add(1)
	if err := s.step(ctx, "observe", vm, ""); err != nil {
		return nil, err
	}
	seen, err := s.place.Observe(ctx, vm)
	return slices.DeleteFunc(seen, func(o Observed) bool { return o.VM != vm }), err
}

func (s *site) Apply(ctx context.Context, o Object) (string, error) {
	if err := s.step(ctx, "apply", o.VM, o.ID); err != nil {
		return "", err
	}
	return s.place.Apply(ctx, o)
}

func (s *site) Withdraw(ctx context.Context, o Object) (string, error) {
	if err := s.step(ctx, "withdraw", o.VM, o.ID); err != nil {
		return "", err
	}
	return s.place.Withdraw(ctx, o)
}

type siteRig struct {
	*rig
	site  *site
	meter *meter
	vms   []uuid.UUID
}

func newSiteRig(t *testing.T, vms int, change func(*Options)) *siteRig {
	base := newRig(t)
	base.r.Close()
	s := &site{}
	s.objects, s.barred = map[string]Observed{}, map[string]uint64{}
	g := &siteRig{rig: base, site: s, meter: &meter{}}
	base.p = &s.place
	running := map[uuid.UUID]string{}
	for range vms {
		vm := uuid.New()
		g.vms = append(g.vms, vm)
		running[vm] = "run"
	}
	g.vm = g.vms[0]
	o := Options{
		Appliers: []Applier{s}, Ledger: g.l, Clock: g.clock, Sweep: time.Hour, Meter: g.meter,
		Instances: func() map[uuid.UUID]string { return running },
	}
	if change != nil {
		change(&o)
	}
	g.r = New(o)
	return g
}

// grantIn grants something to a VM, and does not wake it if asleep.
func (g *siteRig) grantIn(vm uuid.UUID, asleep bool) uuid.UUID {
	g.t.Helper()
	id := uuid.New()
	g.put(ledger.NewGrant(ledger.Actor{Kind: ledger.ActorBroker}, id, vm, uuid.Nil, ledger.GrantRecord{Capability: g.c, Instance: "run"}))
	if !asleep {
		g.r.Wake(vm)
	}
	return id
}

func (g *siteRig) put(e ledger.Event) {
	g.t.Helper()
	if _, err := g.l.Update(context.Background(), func(tx *ledger.Tx) error { return tx.Append(e) }); err != nil {
		g.t.Fatal(err)
	}
}

func (g *siteRig) types(id uuid.UUID) (out []ledger.EventType) {
	g.t.Helper()
	events, err := g.l.Events(0, ledger.EventFilter{Grant: id}, 0)
	if err != nil {
		g.t.Fatal(err)
	}
	for _, e := range events {
		out = append(out, e.Type)
	}
	return out
}

var errBusy = fmt.Errorf("nobody answers: %w", ErrTransient)

// What cannot be made just now is tried again, less often each time, visibly, and
// is on record once when that begins and once when it ends.
func TestTransientFailure(t *testing.T) {
	g := newSiteRig(t, 1, nil)
	var at []time.Time
	var mu sync.Mutex
	g.site.set(func(_ context.Context, verb string, _ uuid.UUID, _ string) error {
		if verb != "apply" {
			return nil
		}
		mu.Lock()
		defer mu.Unlock()
		if at = append(at, time.Now()); len(at) < 5 {
			return errBusy
		}
		return nil
	})
	id := g.grantIn(g.vm, false)
	object := g.p.Objects(ledger.Grant{ID: id})[0].ID
	eventually(t, "a second attempt", func() bool { seen, _ := g.r.TroubleOf(object); return seen.Attempts >= 2 })
	seen, _ := g.r.TroubleOf(object)
	if seen.Verb != Apply || !errors.Is(seen.Err, ErrTransient) || seen.Since.IsZero() {
		t.Errorf("the trouble is %+v", seen)
	}
	pending := g.await(id, ledger.Pending)
	if pending.Troubled != "cannot attach: "+errBusy.Error() {
		t.Errorf("on record is %q", pending.Troubled)
	}
	if settled, err := g.r.Settled(t.Context(), g.vm); err != nil || !settled {
		t.Errorf("a broker that starts would wait for it: %v, %v", settled, err)
	}
	g.await(id, ledger.Active)
	want := []ledger.EventType{ledger.GrantRequested, ledger.GrantTroubled, ledger.GrantRecovered, ledger.GrantActive}
	if got := g.types(id); !slices.Equal(got, want) {
		t.Errorf("on record are %v, want %v", got, want)
	}
	for i := 1; i < len(at); i++ {
		if pause, least := at[i].Sub(at[i-1]), firstPause<<(i-1); pause < least {
			t.Errorf("attempt %d came %v after the one before, want at least %v", i+1, pause, least)
		}
	}
	if got := g.meter.count("fs apply"); got != 4 {
		t.Errorf("%d failures are counted, want 4", got)
	}
	if got := g.r.Troubles(); len(got) != 0 {
		t.Errorf("the troubles are %v", got)
	}
}

// The revocation of what is tried again ends that at once.
func TestRevokedWhileItPauses(t *testing.T) {
	g := newSiteRig(t, 1, nil)
	var applies atomic.Int64
	g.site.set(func(_ context.Context, verb string, _ uuid.UUID, _ string) error {
		if verb == "apply" {
			applies.Add(1)
			return errBusy
		}
		return nil
	})
	id := g.grantIn(g.vm, false)
	object := g.p.Objects(ledger.Grant{ID: id})[0].ID
	eventually(t, "it pauses for long", func() bool {
		seen, _ := g.r.TroubleOf(object)
		return time.Until(seen.Next) > 700*time.Millisecond
	})
	before := applies.Load()
	began := time.Now()
	g.revoke(id)
	g.await(id, ledger.Revoked)
	if took := time.Since(began); took > 500*time.Millisecond {
		t.Errorf("the revocation took %v: it waited for the next attempt", took)
	}
	if _, troubled := g.r.TroubleOf(object); troubled {
		t.Error("it still has trouble")
	}
	time.Sleep(time.Until(began.Add(2 * time.Second)))
	if got := applies.Load(); got != before {
		t.Errorf("it was tried %d times more after its revocation", got-before)
	}
}

// A refusal ends the grant at once, with the reason.
func TestRefusalIsNotTriedAgain(t *testing.T) {
	g := newSiteRig(t, 1, nil)
	var applies atomic.Int64
	g.site.set(func(_ context.Context, verb string, _ uuid.UUID, _ string) error {
		if verb == "apply" {
			applies.Add(1)
			return errors.New("no slot is left")
		}
		return nil
	})
	id := g.grantIn(g.vm, false)
	if got := g.await(id, ledger.Failed); got.Reason != "no slot is left" {
		t.Errorf("the reason is %q", got.Reason)
	}
	time.Sleep(200 * time.Millisecond)
	if applies.Load() != 1 || len(g.r.Troubles()) != 0 {
		t.Errorf("it was tried %d times, troubles %v", applies.Load(), g.r.Troubles())
	}
	if got := g.meter.count("fs apply"); got != 1 {
		t.Errorf("%d failures are counted, want 1", got)
	}
}

// An Apply that takes too long is given up and tried again.
func TestApplyTimesOut(t *testing.T) {
	g := newSiteRig(t, 1, func(o *Options) { o.ApplyTimeout = 30 * time.Millisecond })
	var calls atomic.Int64
	g.site.set(func(ctx context.Context, verb string, _ uuid.UUID, _ string) error {
		if verb == "apply" && calls.Add(1) < 3 {
			<-ctx.Done()
			return ctx.Err()
		}
		return nil
	})
	g.await(g.grantIn(g.vm, false), ledger.Active)
}

// A withdrawal that fails is tried again, less often each time whatever wakes the
// VM meanwhile, and is on record once.
func TestWithdrawalPauses(t *testing.T) {
	g := newSiteRig(t, 1, nil)
	id := g.grantIn(g.vm, false)
	g.await(id, ledger.Active)
	var tries atomic.Int64
	var open atomic.Bool
	g.site.set(func(_ context.Context, verb string, _ uuid.UUID, _ string) error {
		if verb == "withdraw" && !open.Load() {
			tries.Add(1)
			return errors.New("the shim is busy")
		}
		return nil
	})
	g.revoke(id)
	began := time.Now()
	for time.Since(began) < 1500*time.Millisecond {
		g.r.Wake(g.vm)
		time.Sleep(time.Millisecond)
	}
	// 0.05, 0.1, 0.2, 0.4, 0.8 s and more of pauses fit into that time.
	if n := tries.Load(); n < 2 || n > 6 {
		t.Errorf("%d attempts in 1.5 s under a storm of wake-ups, want 2 to 6", n)
	}
	if got := g.await(id, ledger.Revoking); got.Troubled != "cannot detach: the shim is busy" {
		t.Errorf("on record is %q", got.Troubled)
	}
	steps := g.r.Outlook(t.Context(), g.vm)
	if len(steps) != 1 || len(steps[0].Steps) != 1 || steps[0].Steps[0].Verb != Withdraw || steps[0].Steps[0].Trouble == nil || steps[0].Steps[0].Trouble.Attempts < 2 {
		t.Errorf("the outlook is %+v", steps)
	}
	open.Store(true)
	g.await(id, ledger.Revoked)
	want := []ledger.EventType{ledger.GrantRequested, ledger.GrantActive, ledger.GrantRevoking, ledger.GrantTroubled, ledger.GrantRecovered, ledger.GrantRevoked}
	if got := g.types(id); !slices.Equal(got, want) {
		t.Errorf("on record are %v, want %v", got, want)
	}
	eventually(t, "nothing to do", func() bool { return len(g.r.Outlook(t.Context(), g.vm)) == 0 })
}

// What the last broker recorded as troubled is recorded as recovered by the next.
func TestTroubleEndsInAnotherBroker(t *testing.T) {
	g := newSiteRig(t, 1, nil)
	g.site.set(func(_ context.Context, verb string, _ uuid.UUID, _ string) error {
		if verb == "apply" {
			return errBusy
		}
		return nil
	})
	id := g.grantIn(g.vm, false)
	eventually(t, "it is on record", func() bool { return g.await(id, ledger.Pending).Troubled != "" })
	g.r.Close()
	g.site.set(nil)
	g.r = New(g.r.o)
	g.r.Wake(g.vm)
	g.await(id, ledger.Active)
	want := []ledger.EventType{ledger.GrantRequested, ledger.GrantTroubled, ledger.GrantRecovered, ledger.GrantActive}
	if got := g.types(id); !slices.Equal(got, want) {
		t.Errorf("on record are %v, want %v", got, want)
	}
}

// One object that hangs, or fails, holds up nothing else: not another object of
// its VM, not another VM, and no revocation in either, its own included.
func TestAHungApplierHoldsUpNothingElse(t *testing.T) {
	hang := func(ctx context.Context) error { <-ctx.Done(); return ctx.Err() }
	for _, c := range []struct {
		name string
		do   func(ctx context.Context) error
	}{
		{"hangs", hang},
		{"fails", func(context.Context) error { return errBusy }},
	} {
		t.Run(c.name, func(t *testing.T) {
			g := newSiteRig(t, 2, func(o *Options) { o.Patience = 20 * time.Millisecond })
			here, there := g.vms[0], g.vms[1]
			old, elsewhere := g.grantIn(here, false), g.grantIn(there, false)
			g.await(old, ledger.Active)
			g.await(elsewhere, ledger.Active)
			var mu sync.Mutex
			bad := map[string]bool{}
			g.site.set(func(ctx context.Context, verb string, _ uuid.UUID, id string) error {
				mu.Lock()
				is := bad[id]
				mu.Unlock()
				if verb == "apply" && is {
					return c.do(ctx)
				}
				return nil
			})
			var hung []uuid.UUID
			mu.Lock()
			for range 3 * applyWidth {
				id := g.grantIn(here, true)
				bad["o-"+id.String()] = true
				hung = append(hung, id)
			}
			mu.Unlock()
			g.r.Wake(here)
			eventually(t, "they are tried", func() bool {
				g.r.mu.Lock()
				defer g.r.mu.Unlock()
				return len(g.r.applying)+len(g.r.troubles) >= len(hung)
			})
			within := func(what string, id uuid.UUID, state ledger.GrantState) {
				t.Helper()
				began := time.Now()
				g.await(id, state)
				if took := time.Since(began); took > 5*time.Second {
					t.Errorf("%s took %v", what, took)
				}
			}
			within("a grant in the other VM", g.grantIn(there, false), ledger.Active)
			within("another grant in the same VM", g.grantIn(here, false), ledger.Active)
			g.put(change(ledger.GrantRevoking, elsewhere, "test"))
			g.r.Wake(there)
			within("a revocation in the other VM", elsewhere, ledger.Revoked)
			g.revoke(old)
			within("a revocation in the same VM", old, ledger.Revoked)
			for _, id := range hung {
				g.revoke(id)
				within("its own revocation", id, ledger.Revoked)
			}
			if n := g.p.count(); n != 2 {
				t.Errorf("%d objects are there, want the two that were granted last", n)
			}
		})
	}
}

// Who cannot look at the world cuts all the same what is known to have ended.
func TestRevocationDoesNotNeedALook(t *testing.T) {
	g := newSiteRig(t, 2, nil)
	id, other := g.grantIn(g.vm, false), g.grantIn(g.vms[1], false)
	g.await(id, ledger.Active)
	g.await(other, ledger.Active)
	g.site.set(func(ctx context.Context, verb string, vm uuid.UUID, _ string) error {
		if verb == "observe" && vm == g.vm {
			<-ctx.Done()
			return ctx.Err()
		}
		return nil
	})
	g.r.Wake(g.vm) // the lanes hang from here on
	time.Sleep(20 * time.Millisecond)
	g.put(change(ledger.GrantRevoking, other, "test"))
	g.r.Wake(g.vms[1])
	g.await(other, ledger.Revoked)
	g.r.Close()
	g.r = New(g.r.o)
	g.revoke(id)
	g.await(id, ledger.Revoked)
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	look := g.r.Outlook(ctx, g.vm)
	if len(look) != 1 || look[0].Blind == nil || !strings.Contains(look[0].Blind.Error(), "cannot observe fs of VM "+g.vm.String()) {
		t.Errorf("the outlook is %+v, want that the VM cannot be observed", look)
	}
}

// A wake-up that is lost is made up for by the sweep.
func TestSweepHealsALostWakeUp(t *testing.T) {
	g := newSiteRig(t, 1, func(o *Options) { o.Sweep = 30 * time.Millisecond })
	g.r.Wake(g.vm)
	id := g.grantIn(g.vm, true)
	g.await(id, ledger.Active)
	g.put(change(ledger.GrantRevoking, id, "test"))
	g.await(id, ledger.Revoked)
	id = g.grantIn(g.vm, true)
	g.await(id, ledger.Active)
	g.site.place.mu.Lock()
	g.site.objects["stray"] = Observed{ID: "stray", Kind: "fs", VM: g.vm, Generation: 1, Presence: Present}
	g.site.place.mu.Unlock()
	eventually(t, "the stray is gone", func() bool { return g.p.count() == 1 })
}

// counting is a ledger that counts its writes.
type counting struct {
	*ledger.Ledger
	updates, views atomic.Int64
}

func (c *counting) Update(ctx context.Context, fn func(tx *ledger.Tx) error) ([]ledger.Event, error) {
	c.updates.Add(1)
	return c.Ledger.Update(ctx, fn)
}

func (c *counting) View(fn func(*ledger.State)) {
	c.views.Add(1)
	c.Ledger.View(fn)
}

// A sweep of a hundred VMs in which nothing is to be done asks each of them once,
// looks at the ledger a few times, and writes nothing.
func TestIdleSweepIsCheap(t *testing.T) {
	const vms, sweep = 100, 250 * time.Millisecond
	books := &counting{}
	g := newSiteRig(t, vms, func(o *Options) {
		books.Ledger = o.Ledger.(*ledger.Ledger)
		o.Ledger, o.Sweep = books, sweep
	})
	var ids []uuid.UUID
	for _, vm := range g.vms {
		ids = append(ids, g.grantIn(vm, false))
	}
	for _, id := range ids {
		g.await(id, ledger.Active)
	}
	g.r.mu.Lock()
	g.meter.mu.Lock()
	g.meter.passes = 0
	g.meter.mu.Unlock()
	g.r.mu.Unlock()
	time.Sleep(2 * sweep) // what the grants' own wake-ups caused is over
	passes := func() int {
		g.meter.mu.Lock()
		defer g.meter.mu.Unlock()
		return g.meter.passes
	}
	observes, updates, views, before := g.site.observes.Load(), books.updates.Load(), books.views.Load(), passes()
	time.Sleep(3 * sweep)
	// Sweeps are counted, not timed: a slow machine makes fewer.
	done := int64(passes() - before)
	observes, updates, views = g.site.observes.Load()-observes, books.updates.Load()-updates, books.views.Load()-views
	switch slack := int64(vms); { // passes that were under way at either end
	case done == 0:
		t.Fatal("nobody swept")
	case done > 4*vms:
		t.Errorf("%d passes in 3 sweeps of %d VMs", done, vms)
	case observes > done+slack:
		t.Errorf("%d looks at the world in %d passes, want one each", observes, done)
	case views > 5*(done+slack):
		t.Errorf("%d looks at the ledger in %d passes, want at most 5 each", views, done)
	case updates != 0:
		t.Errorf("%d writes to the ledger, want none", updates)
	}
}
