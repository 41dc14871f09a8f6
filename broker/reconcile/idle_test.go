package reconcile

import (
	"context"
	"fmt"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/uuid"

	"spectrum-os.org/broker/broker/ledger"
	"spectrum-os.org/broker/capabilities"
	"spectrum-os.org/broker/clock"
)

// still is a world in which no VM runs. It counts for how many grants somebody
// asked what they need, and how often it was looked at.
type still struct {
	place
	objects, looks, withdrawn atomic.Int64
	left                      atomic.Pointer[Observed]
}

func (s *still) Objects(g ledger.Grant) []Object {
	s.objects.Add(1)
	return s.place.Objects(g)
}

func (s *still) Observe(_ context.Context, vm uuid.UUID) ([]Observed, error) {
	s.looks.Add(1)
	if o := s.left.Load(); o != nil && o.VM == vm {
		return []Observed{*o}, nil
	}
	return nil, nil
}

func (s *still) Withdraw(_ context.Context, o Object) (string, error) {
	s.withdrawn.Add(1)
	if left := s.left.Load(); left != nil && left.ID == o.ID {
		s.left.Store(nil)
	}
	return "", nil
}

// stillRig is a ledger of grants that persist, of VMs that do not run.
type stillRig struct {
	rig
	world *still
	vms   []uuid.UUID
	ids   []uuid.UUID
}

func newStill(t testing.TB, vms, grants int, sweep time.Duration) *stillRig {
	t.Helper()
	kinds := capabilities.NewKinds(capabilities.FS{})
	fake := clock.NewFake()
	l, err := ledger.Open(context.Background(), ledger.Options{Dir: t.TempDir(), Kinds: kinds, Clock: fake})
	if err != nil {
		t.Fatal(err)
	}
	c, err := kinds.Parse("fs:ro:"+uuid.NewString()+":/docs", nil)
	if err != nil {
		t.Fatal(err)
	}
	g := &stillRig{world: &still{place: place{}}}
	g.l, g.clock, g.c = l, fake, c
	for range vms {
		g.vms = append(g.vms, uuid.New())
	}
	_, err = l.Update(context.Background(), func(tx *ledger.Tx) error {
		for i := range grants {
			record := ledger.GrantRecord{Capability: c, Persist: true, Label: fmt.Sprint("d", i)}
			if i >= vms && i < 2*vms { // each VM's second derives from its first
				record.Parent = g.ids[i-vms]
			}
			g.ids = append(g.ids, uuid.New())
			if err := tx.Append(ledger.NewGrant(ledger.Actor{Kind: ledger.ActorBroker}, g.ids[i], g.vms[i%vms], uuid.Nil, record)); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	g.begin(sweep)
	t.Cleanup(func() {
		g.r.Close()
		if err := l.Close(); err != nil {
			t.Error(err)
		}
	})
	return g
}

func (g *stillRig) begin(sweep time.Duration) {
	g.r = New(Options{
		Appliers: []Applier{g.world}, Ledger: g.l, Clock: g.clock, Sweep: sweep,
		Instances: func() map[uuid.UUID]string { return nil },
	})
}

// settle does what a broker does at its start.
func (g *stillRig) settle(t testing.TB) {
	t.Helper()
	for _, vm := range g.vms {
		g.r.Wake(vm)
	}
	for _, vm := range g.vms {
		for {
			settled, err := g.r.Settled(context.Background(), vm)
			if err != nil {
				t.Fatal(err)
			}
			if settled {
				break
			}
			time.Sleep(time.Millisecond)
		}
	}
}

func (g *stillRig) records(t testing.TB, e ...ledger.Event) {
	t.Helper()
	_, err := g.l.Update(context.Background(), func(tx *ledger.Tx) error {
		for _, e := range e {
			if err := tx.Append(e); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

// swept waits until each VM was swept some times more.
func (g *stillRig) swept(t testing.TB) {
	t.Helper()
	for end, least := time.Now().Add(10*time.Second), g.world.looks.Load()+int64(5*len(g.vms)); g.world.looks.Load() < least; time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("nothing is swept")
		}
	}
}

// What VMs hold that do not run costs nothing when the reconciler begins, when it
// is asked whether they are settled, or when it sweeps: nobody asks what the grants
// need, also after grants of other VMs came and went.
func TestAVMThatDoesNotRunCostsNothing(t *testing.T) {
	g := newStill(t, 10, 1000, 5*time.Millisecond)
	g.settle(t)
	if looks := g.world.looks.Load(); looks > 60 {
		t.Errorf("the world was looked at %d times to find 10 VMs settled", looks)
	}
	g.swept(t)
	if n := g.world.objects.Load(); n != 0 {
		t.Fatalf("somebody asked %d times what a grant needs", n)
	}
	other := uuid.New()
	g.records(t, ledger.NewGrant(ledger.Actor{Kind: ledger.ActorBroker}, other, uuid.New(), uuid.Nil, ledger.GrantRecord{Capability: g.c, Persist: true}))
	g.records(t, change(ledger.GrantFailed, other, "test"))
	g.swept(t)
	if n := g.world.objects.Load(); n != 0 {
		t.Fatalf("after another VM's grant ended, somebody asked %d times what a grant needs", n)
	}
}

// Whatever ends of what a VM holds that does not run is found, though nobody says
// so, and although there was nothing to do before.
func TestASweepFindsWhatEndedOfAVMThatDoesNotRun(t *testing.T) {
	lease := func(g *stillRig) uuid.UUID {
		id := uuid.New()
		g.records(t, ledger.NewGrant(ledger.Actor{Kind: ledger.ActorBroker}, id, g.vms[1], uuid.Nil, ledger.GrantRecord{
			Capability: g.c, Persist: true, Deadline: capabilities.Deadline{Wall: g.clock.Now().Wall.Add(time.Hour)},
		}))
		return id
	}
	for name, end := range map[string]func(g *stillRig) []uuid.UUID{
		"revoked": func(g *stillRig) []uuid.UUID {
			g.records(t, change(ledger.GrantRevoking, g.ids[7], "test"))
			return g.ids[7:8]
		},
		"its ancestor was revoked": func(g *stillRig) []uuid.UUID {
			g.records(t, change(ledger.GrantRevoking, g.ids[0], "test"))
			return []uuid.UUID{g.ids[0], g.ids[2]}
		},
		"its lease ended": func(g *stillRig) []uuid.UUID {
			id := lease(g)
			g.swept(t)
			g.clock.Advance(2 * time.Hour)
			return []uuid.UUID{id}
		},
	} {
		t.Run(name, func(t *testing.T) {
			g := newStill(t, 2, 10, 5*time.Millisecond)
			g.t = t
			g.settle(t)
			g.swept(t)
			for _, id := range end(g) {
				// Pending grants that die were never made, and end like the others.
				g.await(id, ledger.Revoked)
			}
		})
	}
	t.Run("barred", func(t *testing.T) {
		g := newStill(t, 2, 10, time.Hour)
		g.settle(t)
		var barred ledger.Grant
		g.l.View(func(s *ledger.State) { barred, _ = s.Grant(g.ids[0]) })
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		if err := g.r.CutNow(ctx, []ledger.Grant{barred}); err != nil || g.world.withdrawn.Load() < 2 {
			t.Errorf("%v, and %d were withdrawn of 2", err, g.world.withdrawn.Load())
		}
	})
	t.Run("what the world has is taken away", func(t *testing.T) {
		g := newStill(t, 2, 10, 5*time.Millisecond)
		g.settle(t)
		g.world.left.Store(&Observed{ID: "o-stray", Kind: "fs", VM: g.vms[1], Generation: 3, Presence: Present})
		for end := time.Now().Add(10 * time.Second); g.world.left.Load() != nil; time.Sleep(time.Millisecond) {
			if time.Now().After(end) {
				t.Fatal("it is still there")
			}
		}
	})
}

// A subtree that falls is looked at a bounded number of times for each of its
// grants, not once for each of them and each other one.
func TestThousandsThatFallAreNotEachLookedAtForEach(t *testing.T) {
	g := newStill(t, 1, 2000, time.Hour)
	g.t = t
	var ends []ledger.Event
	for _, id := range g.ids {
		if id != g.ids[1] {
			ends = append(ends, change(ledger.GrantRevoking, id, "test"))
		}
	}
	g.records(t, ends...)
	g.settle(t)
	for _, id := range g.ids {
		g.await(id, ledger.Revoked)
	}
	if each := g.world.objects.Load() / int64(len(g.ids)); each > 300 {
		t.Errorf("somebody asked %d times what each grant needs", each)
	}
}

// BenchmarkStart is a reconciler that begins with grants of VMs that do not run.
func BenchmarkStart(b *testing.B) {
	for _, n := range []int{1000, 10_000, 100_000} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			g := newStill(b, 100, n, time.Hour)
			for b.Loop() {
				g.r.Close()
				g.begin(time.Hour)
				g.settle(b)
			}
			b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/float64(n), "ns/grant")
		})
	}
}
