package reconcile

import (
	"context"
	"flag"
	"runtime"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"

	"spectrum-os.org/broker/broker/ledger"
	"spectrum-os.org/broker/capabilities"
	"spectrum-os.org/broker/clock"
)

// fleet is the world of many VMs: the objects that each has.
type fleet struct {
	mu  sync.Mutex
	vms map[uuid.UUID]map[string]Observed
}

func (*fleet) Kind() string { return "fs" }

func (*fleet) Objects(g ledger.Grant) []Object {
	return []Object{{ID: "o-" + g.ID.String(), Kind: "fs", VM: g.Holder, Instance: g.Instance, Generation: g.Generation, Deadline: g.Deadline, Capability: g.Capability}}
}

func (f *fleet) Observe(_ context.Context, vm uuid.UUID) ([]Observed, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	out := make([]Observed, 0, len(f.vms[vm]))
	for _, o := range f.vms[vm] {
		out = append(out, o)
	}
	return out, nil
}

func (f *fleet) Apply(context.Context, Object) (string, error) { return "", ErrNotNow }

func (f *fleet) Withdraw(_ context.Context, o Object) (string, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	delete(f.vms[o.VM], o.ID)
	return "", nil
}

func (f *fleet) left() (n int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, objects := range f.vms {
		n += len(objects)
	}
	return n
}

// leases is how many there are. The whole test takes a minute for 100,000.
var leases = flag.Int("leases", 5_000, "leases in TestManyLeases")

// TestManyLeases: they cost no goroutine and no timer each, and when
// all of them end at the same moment, a revocation does not wait for them.
func TestManyLeases(t *testing.T) {
	const each = 250
	vms := *leases / each
	if testing.Short() {
		vms = min(vms, 4)
	}
	kinds := capabilities.NewKinds(capabilities.FS{})
	fake := clock.NewFake()
	l, err := ledger.Open(context.Background(), ledger.Options{Dir: t.TempDir(), Kinds: kinds, Clock: fake})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = l.Close() }()
	c, err := kinds.Parse("fs:ro:"+uuid.NewString()+":/docs", nil)
	if err != nil {
		t.Fatal(err)
	}
	world := &fleet{vms: map[uuid.UUID]map[string]Observed{}}
	runs := map[uuid.UUID]string{}
	broker := ledger.Actor{Kind: ledger.ActorBroker}
	// give has a VM hold n grants that are active and there.
	give := func(vm uuid.UUID, n int, d capabilities.Deadline) (last uuid.UUID) {
		if runs[vm] == "" {
			runs[vm] = "run"
		}
		world.mu.Lock()
		defer world.mu.Unlock()
		if world.vms[vm] == nil {
			world.vms[vm] = map[string]Observed{}
		}
		_, err := l.Update(context.Background(), func(tx *ledger.Tx) error {
			for range n {
				last = uuid.New()
				for _, e := range []ledger.Event{
					ledger.NewGrant(broker, last, vm, uuid.Nil, ledger.GrantRecord{Capability: c, Instance: "run", Deadline: d}),
					ledger.NewChange(ledger.GrantActive, broker, last, ledger.Change{Instance: "run"}),
				} {
					if err := tx.Append(e); err != nil {
						return err
					}
				}
				world.vms[vm]["o-"+last.String()] = Observed{ID: "o-" + last.String(), Kind: "fs", VM: vm, Instance: "run", Generation: 1, Presence: Present}
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
		return last
	}
	holders := make([]uuid.UUID, vms)
	deadline := capabilities.NewDeadline(fake.Now(), time.Hour)
	for i := range holders {
		holders[i] = uuid.New()
		give(holders[i], 1, deadline)
	}
	other := uuid.New()
	revoked := give(other, 1, capabilities.Deadline{})
	r := New(Options{
		Appliers: []Applier{world}, Ledger: l, Clock: fake, Sweep: time.Hour,
		Instances: func() map[uuid.UUID]string { return runs },
	})
	defer r.Close()
	settle := func() {
		t.Helper()
		for vm := range runs {
			r.Wake(vm)
			if settled, err := r.Settled(t.Context(), vm); err != nil || !settled {
				t.Fatalf("a VM is settled: %v, %v", settled, err)
			}
		}
	}
	settle()
	few := runtime.NumGoroutine()
	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	began := time.Now()
	for _, vm := range holders {
		give(vm, each-1, deadline)
	}
	t.Logf("%d leases on record in %v", vms*each, time.Since(began).Round(time.Millisecond))
	settle()
	runtime.GC()
	runtime.ReadMemStats(&after)
	if many := runtime.NumGoroutine(); many > few+8 {
		t.Errorf("%d goroutines with %d leases, %d with %d", many, vms*each, few, vms)
	}
	t.Logf("%d bytes of memory for each, with its object in the world of the test", (after.HeapAlloc-before.HeapAlloc)/uint64(vms*(each-1)))

	fake.Advance(time.Hour)
	began = time.Now()
	var due map[uuid.UUID]struct{}
	l.View(func(s *ledger.State) { due = s.DueHolders(fake.Now()) })
	t.Logf("found whose they are in %v", time.Since(began).Round(10*time.Microsecond))
	if len(due) != vms {
		t.Fatalf("leases of %d VMs are due, want %d", len(due), vms)
	}
	for vm := range due {
		r.Wake(vm)
	}
	for world.left() == vms*each+1 { // until it has begun
		time.Sleep(time.Millisecond)
	}
	began = time.Now()
	if _, err := l.Update(context.Background(), func(tx *ledger.Tx) error {
		return tx.Append(ledger.NewChange(ledger.GrantRevoking, broker, revoked, ledger.Change{Reason: "test"}))
	}); err != nil {
		t.Fatal(err)
	}
	durable := time.Since(began)
	r.Wake(other)
	stateOf := func(id uuid.UUID) (s ledger.GrantState) {
		l.View(func(st *ledger.State) { g, _ := st.Grant(id); s = g.State })
		return s
	}
	for end := time.Now().Add(time.Minute); stateOf(revoked) != ledger.Revoked; time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("a revocation is starved")
		}
	}
	cut := time.Since(began)
	open := 0
	l.View(func(s *ledger.State) {
		open = len(s.Grants(ledger.Filter{States: []ledger.GrantState{ledger.Active, ledger.Revoking}}))
	})
	t.Logf("in the midst of that one revocation was durable in %v and confirmed in %v, with %d leases still to end", durable, cut, open)
	if open == 0 && !testing.Short() {
		t.Errorf("a revocation was confirmed after all of %d leases", vms*each)
	}
	for end := time.Now().Add(3 * time.Minute); ; time.Sleep(20 * time.Millisecond) {
		var rest []ledger.Grant
		l.View(func(s *ledger.State) {
			rest = s.Grants(ledger.Filter{States: []ledger.GrantState{ledger.Pending, ledger.Active, ledger.Revoking}})
		})
		if len(rest) == 0 {
			break
		}
		if time.Now().After(end) {
			t.Fatalf("%d leases are still not over, such as %+v", len(rest), rest[0])
		}
	}
	t.Logf("all had ended after %v", time.Since(began).Round(time.Millisecond))
	if n := world.left(); n != 0 {
		t.Errorf("%d objects are left", n)
	}
	for end := time.Now().Add(20 * time.Second); runtime.NumGoroutine() > few+8; time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("%d goroutines are left, and there were %d", runtime.NumGoroutine(), few)
		}
	}
}
