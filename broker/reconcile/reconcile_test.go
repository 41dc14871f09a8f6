package reconcile

import (
	"context"
	"errors"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/uuid"

	"spectrum-os.org/broker/broker/ledger"
	"spectrum-os.org/broker/capabilities"
	"spectrum-os.org/broker/clock"
)

// place is a world with real semantics: objects exist or not, a withdrawal
// forbids older applications, and one fault at a time can be injected.
type place struct {
	mu      sync.Mutex
	objects map[string]Observed
	made    int               // objects, ever
	barred  map[string]uint64 // generation of the last withdrawal
	// applyErr and withdrawErr fail the next call; hold keeps an application
	// under way until it is closed.
	applyErr, withdrawErr error
	hold                  chan struct{}
	began                 chan struct{}
	// stuck are objects whose withdrawal hangs until the channel is closed.
	stuck map[string]chan struct{}
	// note is what applications say, and force what withdrawals do; agentErr is what an agent does that is
	// asked again.
	note, force string
	agentErr    error
}

func (p *place) AgentBack(context.Context, Object) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.agentErr
}

func (*place) Kind() string { return "fs" }

func (*place) Objects(g ledger.Grant) []Object {
	return []Object{{ID: "o-" + g.ID.String(), Kind: "fs", VM: g.Holder, Instance: g.Instance, Generation: g.Generation, Deadline: g.Deadline, Capability: g.Capability}}
}

func (p *place) Observe(context.Context, uuid.UUID) ([]Observed, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	var out []Observed
	for _, o := range p.objects {
		out = append(out, o)
	}
	return out, nil
}

func (p *place) Apply(_ context.Context, o Object) (string, error) {
	p.mu.Lock()
	hold := p.hold
	err := p.applyErr
	p.applyErr = nil
	p.mu.Unlock()
	if hold != nil {
		p.began <- struct{}{}
		<-hold
	}
	if err != nil {
		return "", err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if o.Generation <= p.barred[o.ID] {
		return "", errors.New("an older generation")
	}
	if _, ok := p.objects[o.ID]; !ok {
		p.made++
	}
	p.objects[o.ID] = Observed{ID: o.ID, Kind: o.Kind, VM: o.VM, Instance: o.Instance, Generation: o.Generation, Presence: Present}
	return p.note, nil
}

func (p *place) Withdraw(ctx context.Context, o Object) (string, error) {
	p.mu.Lock()
	stuck := p.stuck[o.ID]
	p.mu.Unlock()
	if stuck != nil {
		select {
		case <-stuck:
		case <-ctx.Done():
			return "", ctx.Err()
		}
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if err := p.withdrawErr; err != nil {
		p.withdrawErr = nil
		return "", err
	}
	p.barred[o.ID] = max(p.barred[o.ID], o.Generation)
	delete(p.objects, o.ID)
	return p.force, nil
}

func (p *place) count() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return len(p.objects)
}

func (p *place) applied() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.made
}

// rig is a reconciler on a real ledger.
type rig struct {
	t     *testing.T
	l     *ledger.Ledger
	r     *Reconciler
	p     *place
	clock *clock.Fake
	vm    uuid.UUID
	c     capabilities.Capability
}

func newRig(t *testing.T) *rig {
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
	g := &rig{t: t, l: l, clock: fake, vm: uuid.New(), c: c, p: &place{objects: map[string]Observed{}, barred: map[string]uint64{}, began: make(chan struct{}, 16)}}
	g.r = New(Options{
		Appliers: []Applier{g.p}, Ledger: l, Clock: fake, Sweep: 20 * time.Millisecond,
		Instances: func() map[uuid.UUID]string { return map[uuid.UUID]string{g.vm: "run"} },
	})
	t.Cleanup(func() {
		g.r.Close()
		if err := l.Close(); err != nil {
			t.Error(err)
		}
	})
	return g
}

func (g *rig) append(e ...ledger.Event) {
	g.t.Helper()
	_, err := g.l.Update(context.Background(), func(tx *ledger.Tx) error {
		for _, e := range e {
			if err := tx.Append(e); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		g.t.Fatal(err)
	}
	g.r.Wake(g.vm)
}

func (g *rig) grant(change func(*ledger.GrantRecord)) uuid.UUID {
	g.t.Helper()
	id := uuid.New()
	record := ledger.GrantRecord{Capability: g.c, Instance: "run"}
	if change != nil {
		change(&record)
	}
	g.append(ledger.NewGrant(ledger.Actor{Kind: ledger.ActorBroker}, id, g.vm, uuid.Nil, record))
	return id
}

func (g *rig) revoke(id uuid.UUID) {
	g.t.Helper()
	g.append(change(ledger.GrantRevoking, id, "test"))
}

func (g *rig) await(id uuid.UUID, want ledger.GrantState) ledger.Grant {
	g.t.Helper()
	var got ledger.Grant
	for end := time.Now().Add(10 * time.Second); time.Now().Before(end); time.Sleep(2 * time.Millisecond) {
		g.l.View(func(s *ledger.State) { got, _ = s.Grant(id) })
		if got.State == want {
			return got
		}
	}
	g.t.Fatalf("the grant is %s (%s), want %s", got.State, got.Reason, want)
	return got
}

func TestGrantIsAppliedAndWithdrawn(t *testing.T) {
	g := newRig(t)
	id := g.grant(nil)
	if got := g.await(id, ledger.Active); got.Instance != "run" {
		t.Errorf("it is tied to run %q", got.Instance)
	}
	g.revoke(id)
	g.await(id, ledger.Revoked)
	if n := g.p.count(); n != 0 {
		t.Errorf("%d objects are left", n)
	}
}

func TestForceIsOnRecord(t *testing.T) {
	g := newRig(t)
	id := g.grant(nil)
	g.await(id, ledger.Active)
	g.p.mu.Lock()
	g.p.force = "what served it was killed"
	g.p.mu.Unlock()
	g.revoke(id)
	if got := g.await(id, ledger.Revoked); got.Degraded != "what served it was killed" {
		t.Errorf("the record says %q", got.Degraded)
	}
	// Who looked at the ledger before that records nothing twice.
	late := []ledger.Event{change(ledger.GrantDegraded, id, "what served it was killed"), change(ledger.GrantRevoked, id, "")}
	if err := g.r.append(t.Context(), late); err != nil {
		t.Fatal(err)
	}
	events, err := g.l.Events(0, ledger.EventFilter{Grant: id, Types: []ledger.EventType{ledger.GrantDegraded, ledger.GrantRevoked}}, 0)
	if err != nil || len(events) != 2 || events[0].Type != ledger.GrantDegraded {
		t.Errorf("recorded were %v, %v; want that it was degraded, and then revoked", events, err)
	}
}

func TestFailedApplicationLeavesNothing(t *testing.T) {
	g := newRig(t)
	g.p.applyErr = errors.New("no such luck")
	id := g.grant(nil)
	if got := g.await(id, ledger.Failed); got.Reason != "no such luck" {
		t.Errorf("the reason is %q", got.Reason)
	}
	if err := g.r.Failure(id); err == nil || err.Error() != "no such luck" {
		t.Errorf("the failure is %v", err)
	}
}

// A revocation while the grant is still being applied: it must not wait for
// the application, and the application must not win afterwards.
func TestRevokedWhileItIsApplied(t *testing.T) {
	g := newRig(t)
	hold := make(chan struct{})
	g.p.hold = hold
	id := g.grant(nil)
	<-g.p.began
	g.revoke(id)
	g.await(id, ledger.Revoked)
	g.p.mu.Lock()
	g.p.hold = nil
	g.p.mu.Unlock()
	close(hold)
	time.Sleep(100 * time.Millisecond)
	if n := g.p.count(); n != 0 {
		t.Errorf("%d objects exist after the revocation", n)
	}
	g.await(id, ledger.Revoked)
}

// Of many that wait for their turn, none is begun once it is revoked.
func TestNothingIsAppliedAfterItsRevocation(t *testing.T) {
	g := newRig(t)
	hold := make(chan struct{})
	g.p.hold = hold
	var ids []uuid.UUID
	var requests []ledger.Event
	for range 12 { // in one update, so that one pass plans them all
		id := uuid.New()
		ids = append(ids, id)
		requests = append(requests, ledger.NewGrant(ledger.Actor{Kind: ledger.ActorBroker}, id, g.vm, uuid.Nil, ledger.GrantRecord{Capability: g.c, Instance: "run"}))
	}
	g.append(requests...)
	for range applyWidth {
		<-g.p.began
	}
	for _, id := range ids {
		g.revoke(id)
	}
	for _, id := range ids {
		g.await(id, ledger.Revoked)
	}
	close(hold)
	select {
	case <-g.p.began:
		t.Error("an application began after its grant was revoked")
	case <-time.After(300 * time.Millisecond):
	}
}

func TestFailedWithdrawalIsTriedAgain(t *testing.T) {
	g := newRig(t)
	id := g.grant(nil)
	g.await(id, ledger.Active)
	g.p.mu.Lock()
	g.p.withdrawErr = errors.New("not now")
	g.p.mu.Unlock()
	g.revoke(id)
	g.await(id, ledger.Revoked)
	if n := g.p.count(); n != 0 {
		t.Errorf("%d objects are left", n)
	}
}

// One guest holds what is taken from it; what else is taken, before or after, is
// gone and recorded at once.
func TestWithdrawalsDoNotWaitForEachOther(t *testing.T) {
	g := newRig(t)
	held, quick, later := g.grant(nil), g.grant(nil), g.grant(nil)
	for _, id := range []uuid.UUID{held, quick, later} {
		g.await(id, ledger.Active)
	}
	release := make(chan struct{})
	g.p.mu.Lock()
	g.p.stuck = map[string]chan struct{}{"o-" + held.String(): release}
	g.p.mu.Unlock()
	g.append(change(ledger.GrantRevoking, held, "test"), change(ledger.GrantRevoking, quick, "test"))
	g.await(quick, ledger.Revoked)
	g.revoke(later)
	g.await(later, ledger.Revoked)
	g.await(held, ledger.Revoking)
	if settled, err := g.r.Settled(context.Background(), g.vm); err != nil || settled {
		t.Errorf("settled is %v, %v while a withdrawal hangs", settled, err)
	}
	close(release)
	g.await(held, ledger.Revoked)
	for end := time.Now().Add(10 * time.Second); ; time.Sleep(2 * time.Millisecond) {
		if settled, err := g.r.Settled(context.Background(), g.vm); err == nil && settled {
			return
		}
		if time.Now().After(end) {
			t.Fatal("it never settles")
		}
	}
}

// failing is a ledger whose disk is full while full is set.
type failing struct {
	*ledger.Ledger
	full atomic.Bool
}

func (f *failing) Update(ctx context.Context, fn func(tx *ledger.Tx) error) ([]ledger.Event, error) {
	if f.full.Load() {
		return nil, ledger.ErrNotRecorded
	}
	return f.Ledger.Update(ctx, fn)
}

// A revocation that cannot be recorded, and a lease that ends meanwhile, are cut
// all the same, stay cut, and are recorded once that is possible.
func TestCutWithoutTheLedger(t *testing.T) {
	g := newRig(t)
	disk := &failing{Ledger: g.l}
	g.r.o.Ledger = disk
	parent := g.grant(nil)
	child := g.grant(func(r *ledger.GrantRecord) { r.Parent = parent })
	lease := g.grant(func(r *ledger.GrantRecord) { r.Deadline = capabilities.NewDeadline(g.clock.Now(), time.Minute) })
	for _, id := range []uuid.UUID{parent, child, lease} {
		g.await(id, ledger.Active)
	}
	disk.full.Store(true)
	g.clock.Advance(time.Minute)
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	if err := g.r.CutNow(ctx, []ledger.Grant{g.await(parent, ledger.Active)}); err != nil {
		t.Fatal(err)
	}
	for end := time.Now().Add(10 * time.Second); g.p.count() > 0; time.Sleep(2 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("the lease gives access although it has ended")
		}
	}
	time.Sleep(100 * time.Millisecond) // some sweeps
	if n := g.p.count(); n != 0 {
		t.Errorf("%d objects are back", n)
	}
	g.await(parent, ledger.Active)
	disk.full.Store(false)
	g.await(lease, ledger.Revoked)
	time.Sleep(50 * time.Millisecond)
	g.await(parent, ledger.Active)
	g.append(change(ledger.GrantRevoking, parent, "late"), change(ledger.GrantRevoking, child, "late"))
	g.r.Unbar(parent, child)
	g.await(parent, ledger.Revoked)
	g.await(child, ledger.Revoked)
}

// A grant that no agent took up says so until one has.
func TestAgentCatchesUp(t *testing.T) {
	g := newRig(t)
	g.p.note, g.p.agentErr = "nobody mounted it", errors.New("not yet")
	active := g.await(g.grant(nil), ledger.Active)
	for _, c := range []struct {
		err  error
		want string
	}{{errors.New("not yet"), g.p.note}, {nil, ""}, {errors.New("lost"), g.p.note}} {
		g.p.mu.Lock()
		g.p.agentErr = c.err
		g.p.mu.Unlock()
		g.r.AgentAnswers(context.Background(), g.vm, true)
		if got := g.r.Reason(active); got != c.want {
			t.Errorf("after the agent answered %v the reason is %q, want %q", c.err, got, c.want)
		}
	}
}

func TestLeaseEndsByTheClock(t *testing.T) {
	g := newRig(t)
	id := g.grant(func(r *ledger.GrantRecord) { r.Deadline = capabilities.NewDeadline(g.clock.Now(), time.Minute) })
	g.await(id, ledger.Active)
	g.clock.Advance(time.Minute)
	got := g.await(id, ledger.Revoked)
	if got.Reason == "" {
		t.Error("it has no reason")
	}
	if n := g.p.count(); n != 0 {
		t.Errorf("%d objects are left", n)
	}
}

func TestChildEndsWithItsParent(t *testing.T) {
	g := newRig(t)
	parent := g.grant(nil)
	child := g.grant(func(r *ledger.GrantRecord) { r.Parent = parent })
	g.await(parent, ledger.Active)
	g.await(child, ledger.Active)
	g.revoke(parent)
	g.await(parent, ledger.Revoked)
	g.await(child, ledger.Revoked)
	if n := g.p.count(); n != 0 {
		t.Errorf("%d objects are left", n)
	}
}

func TestLostObjectEndsItsGrant(t *testing.T) {
	g := newRig(t)
	id := g.grant(nil)
	g.await(id, ledger.Active)
	g.p.mu.Lock()
	clear(g.p.objects)
	g.p.mu.Unlock()
	g.await(id, ledger.Revoked)
	if n := g.p.count(); n != 0 {
		t.Errorf("the guest got it back")
	}
}

func TestOrphanIsRemoved(t *testing.T) {
	g := newRig(t)
	g.p.objects["stray"] = Observed{ID: "stray", Kind: "fs", VM: g.vm, Generation: 7, Presence: Present}
	g.r.Wake(g.vm)
	for end := time.Now().Add(10 * time.Second); g.p.count() > 0; time.Sleep(2 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("it is still there")
		}
	}
}
