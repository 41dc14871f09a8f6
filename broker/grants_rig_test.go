package broker

import (
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"

	"spectrum-os.org/broker/broker/api"
	"spectrum-os.org/broker/broker/keys"
	"spectrum-os.org/broker/broker/ledger"
	"spectrum-os.org/broker/broker/reconcile"
	"spectrum-os.org/broker/capabilities"
	"spectrum-os.org/broker/clock"
	"spectrum-os.org/broker/policy"
	"spectrum-os.org/broker/sources"
	"spectrum-os.org/broker/vmm/shim"
)

// TestMain lets the test binary be a policy worker.
func TestMain(m *testing.M) {
	if len(os.Args) == 2 && os.Args[1] == "policy-worker" {
		os.Exit(policy.WorkerMain())
	}
	os.Exit(m.Run())
}

// things applies file grants to a world that is a map. It keeps the semantics of
// an applier: a withdrawal forbids older applications, and what belongs to a run
// is not in another.
type things struct {
	mu      sync.Mutex
	objects map[string]reconcile.Observed
	barred  map[string]uint64
	// thinking is called once, when policy has allowed a request and before it
	// is recorded.
	thinking func()
	// stuck, where it is not nil, is what withdrawals wait for.
	stuck chan struct{}
	// stuckIn, where it is not nil, is the VM to which that is confined.
	stuckIn uuid.UUID
	// needs, where it is not nil, is a VM that the objects of all others need.
	needs uuid.UUID
	// fails is what becomes of an object that is to be made.
	fails func(reconcile.Object) error
}

func (*things) Kind() string { return "fs" }

func (s *things) Objects(g ledger.Grant) []reconcile.Object {
	o := reconcile.Object{
		ID: "o-" + g.ID.String(), Kind: "fs", VM: g.Holder, Instance: g.Instance, Generation: g.Generation,
		Deadline: g.Deadline, Capability: g.Capability, Label: g.Label,
	}
	if g.Persist {
		o.Instance = ""
	}
	if s.needs != uuid.Nil && s.needs != g.Holder {
		o.Needs = []uuid.UUID{s.needs}
	}
	return []reconcile.Object{o}
}

func (s *things) Observe(_ context.Context, vm uuid.UUID) ([]reconcile.Observed, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	var out []reconcile.Observed
	for _, o := range s.objects {
		if o.VM == vm {
			out = append(out, o)
		}
	}
	return out, nil
}

func (s *things) Apply(_ context.Context, o reconcile.Object) (string, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.fails != nil {
		if err := s.fails(o); err != nil {
			return "", err
		}
	}
	if o.Generation <= s.barred[o.ID] {
		return "", errors.New("an older generation")
	}
	s.objects[o.ID] = reconcile.Observed{
		ID: o.ID, Kind: "fs", VM: o.VM, Instance: o.Instance, Generation: o.Generation, Presence: reconcile.Present,
	}
	return "", nil
}

func (s *things) Withdraw(ctx context.Context, o reconcile.Object) (string, error) {
	s.mu.Lock()
	stuck := s.stuck
	if s.stuckIn != uuid.Nil && s.stuckIn != o.VM {
		stuck = nil
	}
	s.mu.Unlock()
	if stuck != nil {
		select {
		case <-stuck:
		case <-ctx.Done():
			return "", ctx.Err()
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.barred[o.ID] = max(s.barred[o.ID], o.Generation)
	delete(s.objects, o.ID)
	return "", nil
}

func (s *things) Check(context.Context, capabilities.Capability) error {
	s.mu.Lock()
	think := s.thinking
	s.thinking = nil
	s.mu.Unlock()
	if think != nil {
		think()
	}
	return nil
}

// has tells whether a grant's object is there.
func (s *things) has(id uuid.UUID) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	_, ok := s.objects["o-"+id.String()]
	return ok
}

// granting is a broker that decides, records and reconciles. Its VMs have no
// shims: their runs are what the test says.
type granting struct {
	*Broker
	t      *testing.T
	things *things
}

const allowsAll = "package spectrum.grant\n\nallow := true\n"

// newGranting is a broker with the VMs mail1 of the partition workID and mail2
// of homeID, both running. Its policies are Rego, for the host and the partition
// work; home's allows everything.
func newGranting(t *testing.T, host, work string) *granting {
	t.Helper()
	return newGrantingAt(t, host, work, clock.System{})
}

// newGrantingAt is the same by another clock.
func newGrantingAt(t *testing.T, host, work string, now clock.Clock) *granting {
	t.Helper()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	kinds := capabilities.NewKinds(capabilities.FS{})
	dir := t.TempDir()
	// Not t.TempDir: the paths of sockets must be short.
	runtime, err := os.MkdirTemp("", "run-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(runtime) })
	b := &Broker{
		o: Options{
			StateDir: dir, RuntimeDir: runtime, VMM: "none", Virtiofsd: "none", Shim: "none",
			PolicyWorker: []string{exe, "policy-worker"}, Stretch: 20, Clock: now,
		},
		log: slog.New(slog.DiscardHandler), ctx: ctx, kinds: kinds,
		running: map[uuid.UUID]*unit{}, policyErrors: map[policy.EngineID]string{}, policyFiles: map[policy.EngineID][]string{},
		labels: map[labelKey]bool{}, unrecorded: map[uuid.UUID]tombstone{}, barredKeys: map[string]keyTombstone{},
	}
	if err := b.o.defaults(); err != nil {
		t.Fatal(err)
	}
	b.metrics = newMetrics(b)
	g := &granting{Broker: b, t: t, things: &things{objects: map[string]reconcile.Observed{}, barred: map[string]uint64{}}}
	g.open()
	b.engines = policy.NewEngines(policy.Options{Worker: b.o.PolicyWorker, Stretch: b.o.Stretch, Name: b.engineName})
	t.Cleanup(func() {
		cancel()
		b.wg.Wait()
		b.reconciler.Close()
		b.engines.Close()
		if err := b.ledger.Close(); err != nil {
			t.Error(err)
		}
		if r, err := ledger.Verify(context.Background(), dir); err != nil || r.Broken != nil {
			t.Errorf("the ledger is not whole after the test: %+v, %v", r.Broken, err)
		}
	})
	b.inventory.Store(&inventory{
		partitions: map[uuid.UUID]sources.Partition{workID: {ID: workID}, homeID: {ID: homeID}},
		definitions: map[uuid.UUID]sources.Definition{
			mail1: {ID: mail1, Partition: workID, Alias: "mail", Aliases: []string{"mail"}},
			mail2: {ID: mail2, Partition: homeID, Alias: "mail", Aliases: []string{"mail"}},
		},
	})
	for vm, partition := range map[uuid.UUID]uuid.UUID{mail1: workID, mail2: homeID} {
		g.append(ledger.Event{Type: ledger.VMBound, Actor: brokerActor, VM: vm, Partition: partition})
		g.run(vm, "run-1")
	}
	for id, rego := range map[policy.EngineID]string{
		policy.HostEngine: host, policy.PartitionEngine(workID): work, policy.PartitionEngine(homeID): allowsAll,
	} {
		if _, err := b.engines.Load(ctx, id, policy.Sources{Files: map[string][]byte{"p.rego": []byte(rego)}, Dir: "p"}); err != nil {
			t.Fatal(err)
		}
	}
	return g
}

// open is a broker's start: what it knows is what is on the disk and in the world.
func (g *granting) open() {
	g.t.Helper()
	var err error
	g.ledger, err = ledger.Open(g.ctx, ledger.Options{Dir: g.o.StateDir, Kinds: g.kinds, Clock: g.o.Clock, Observe: g.metrics.committed})
	if err != nil {
		g.t.Fatal(err)
	}
	if g.keys, err = keys.Open(g.ctx, g.ledger, g.o.StateDir, g.kinds, g.log); err != nil {
		g.t.Fatal(err)
	}
	g.reconciler = reconcile.New(reconcile.Options{
		Appliers: []reconcile.Applier{g.things}, Ledger: g.ledger, Clock: g.o.Clock, Instances: g.usable, Sweep: 50 * time.Millisecond, Meter: g.metrics.meter,
	})
}

// restart is a broker that is killed, has something happen, and is started
// again with what is on the disk and in the world.
func (g *granting) restart(meanwhile func()) {
	g.t.Helper()
	g.reconciler.Close()
	if err := g.ledger.Close(); err != nil {
		g.t.Fatal(err)
	}
	if meanwhile != nil {
		meanwhile()
	}
	g.open()
}

func (g *granting) append(events ...ledger.Event) {
	g.t.Helper()
	_, err := g.ledger.Update(context.Background(), func(tx *ledger.Tx) error {
		for _, e := range events {
			if err := tx.Append(e); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		g.t.Fatal(err)
	}
}

// unitOf is a VM in a run, on record or not.
func (g *granting) unitOf(vm uuid.UUID, run string) *unit {
	u := newUnit(vm, g.t.TempDir(), nil, shim.State{VM: vm, Instance: run, Phase: shim.Running})
	g.mu.Lock()
	defer g.mu.Unlock()
	g.running[vm] = u
	return u
}

// run begins a run of a VM, on record.
func (g *granting) run(vm uuid.UUID, run string) *unit {
	g.t.Helper()
	if err := g.recordRun(context.Background(), ledger.VMStarted, brokerActor, vm, run, ""); err != nil {
		g.t.Fatal(err)
	}
	return g.unitOf(vm, run)
}

// vanish has a VM end without anybody recording it.
func (g *granting) vanish(vm uuid.UUID) {
	g.mu.Lock()
	defer g.mu.Unlock()
	delete(g.running, vm)
}

// asks is a person's request for a path of the VM's own partition.
func (g *granting) asks(vm uuid.UUID, path string, change ...func(*request)) request {
	g.t.Helper()
	partition := workID
	if vm == mail2 {
		partition = homeID
	}
	c, err := g.kinds.Parse("fs:ro:"+partition.String()+":"+path, nil)
	if err != nil {
		g.t.Fatal(err)
	}
	uid := uint32(1000)
	r := request{
		action: policy.ActionGrant, actor: ledger.Actor{Kind: ledger.ActorPerson, UID: &uid}, holder: vm, capability: c, narrower: true,
	}
	for _, f := range change {
		f(&r)
	}
	return r
}

func persists(r *request) { r.persist = true }

// granted is a grant that is active.
func (g *granting) granted(vm uuid.UUID, path string, change ...func(*request)) ledger.Grant {
	g.t.Helper()
	made, err := g.grant(g.t.Context(), g.asks(vm, path, change...))
	if err != nil {
		g.t.Fatal(err)
	}
	return g.awaitState(made.ID, ledger.Active)
}

func (g *granting) awaitState(id uuid.UUID, want ledger.GrantState) ledger.Grant {
	g.t.Helper()
	ctx, cancel := context.WithTimeout(g.t.Context(), 20*time.Second)
	defer cancel()
	got, err := g.await(ctx, id, func(x ledger.Grant) bool { return x.State == want })
	if err != nil {
		g.t.Fatalf("grant %s is %s (%s), want %s", id, got.State, got.Reason, want)
	}
	return got
}

// look is a grant as it is on record.
func (g *granting) look(id uuid.UUID) (out ledger.Grant) {
	g.ledger.View(func(s *ledger.State) { out, _ = s.Grant(id) })
	return out
}

func (g *granting) count() (n int) {
	g.ledger.View(func(s *ledger.State) { n = len(s.Grants(ledger.Filter{})) })
	return n
}

func (g *granting) events(types ...ledger.EventType) []ledger.Event {
	g.t.Helper()
	out, err := g.ledger.Events(0, ledger.EventFilter{Types: types}, 1000)
	if err != nil {
		g.t.Fatal(err)
	}
	return out
}

// refused asserts that a request is refused with a code and for a reason, and
// that the refusal is all there is on record of it. What else the refusal must
// be is looked at by also.
func (g *granting) refused(r request, code api.Code, says string, also ...func(*api.Error)) {
	g.t.Helper()
	grants, denials := g.count(), len(g.events(ledger.GrantDenied))
	made, err := g.grant(g.t.Context(), r)
	e, ok := asAPI(err)
	if !ok || e.Code != code || !strings.Contains(e.Detail, says) {
		g.t.Fatalf("grant %s, error %v (%s); want %s saying %q", made.ID, err, api.CodeOf(err), code, says)
	}
	if n := g.count(); n != grants {
		g.t.Errorf("a refused request made %d grants", n-grants)
	}
	on := g.events(ledger.GrantDenied)
	if len(on) != denials+1 {
		g.t.Fatalf("%d refusals are on record, want one more than %d", len(on), denials)
	}
	last := on[len(on)-1]
	var d struct{ Reason string }
	if err := json.Unmarshal(last.Data, &d); err != nil || d.Reason != e.Detail || last.VM != r.holder || last.Actor.Kind != r.actor.Kind {
		g.t.Errorf("on record is %s of VM %s by a %s, %v; want %q", last.Data, last.VM, last.Actor.Kind, err, e.Detail)
	}
	for _, look := range also {
		look(e)
	}
}
