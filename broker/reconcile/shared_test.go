package reconcile

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"

	"spectrum-os.org/broker/broker/ledger"
	"spectrum-os.org/broker/capabilities"
)

// bus is a world in which all grants of a VM share one object, as they do a NIC,
// which needs another VM where one is set. It keeps the semantics that appliers
// owe: older generations are refused, of one generation owners only become
// fewer, and a withdrawal forbids what is older. It refuses what breaks a law of
// its own with an error that tests look for.
type bus struct {
	needs uuid.UUID
	// silent: what is observed does not tell the owners.
	silent bool

	mu      sync.Mutex
	there   map[string]*wired
	barred  map[string]uint64
	history []string
	// fail is called before each step; what it returns is the step's outcome.
	fail func(verb string, o Object) error
}

type wired struct {
	Observed
	deadline capabilities.Deadline
}

func (*bus) Kind() string { return "fs" }

func (b *bus) Objects(g ledger.Grant) []Object {
	o := Object{ID: "nic-" + g.Holder.String(), Kind: "fs", VM: g.Holder, Instance: g.Instance, Generation: g.Changed, Deadline: g.Deadline, Capability: g.Capability}
	if g.Persist {
		o.Instance = ""
	}
	if b.needs != uuid.Nil {
		o.Needs = []uuid.UUID{b.needs}
	}
	return []Object{o}
}

func (b *bus) step(ctx context.Context, verb string, o Object) error {
	b.mu.Lock()
	fail := b.fail
	b.mu.Unlock()
	if fail != nil {
		if err := fail(verb, o); err != nil {
			return err
		}
	}
	return ctx.Err()
}

func (b *bus) Observe(_ context.Context, vm uuid.UUID) ([]Observed, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	var out []Observed
	for _, o := range b.there {
		if o.VM == vm {
			seen := o.Observed
			if b.silent {
				seen.Owners = nil
			}
			out = append(out, seen)
		}
	}
	return out, nil
}

func (b *bus) Apply(ctx context.Context, o Object) (string, error) {
	if err := b.step(ctx, "apply", o); err != nil {
		return "", err
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	have := b.there[o.ID]
	owners := slices.Clone(o.Owners)
	switch {
	case o.Generation <= b.barred[o.ID], have != nil && o.Generation < have.Generation:
		return "", ErrStale
	case have != nil && o.Generation == have.Generation:
		owners = slices.DeleteFunc(owners, func(g uuid.UUID) bool { return !slices.Contains(have.Owners, g) })
	}
	b.there[o.ID] = &wired{Observed{ID: o.ID, Kind: o.Kind, VM: o.VM, Instance: o.Instance, Generation: o.Generation, Presence: Present, Owners: owners}, o.Deadline}
	b.history = append(b.history, fmt.Sprintf("apply %d", len(owners)))
	return "", nil
}

func (b *bus) Withdraw(ctx context.Context, o Object) (string, error) {
	if err := b.step(ctx, "withdraw", o); err != nil {
		return "", err
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if have := b.there[o.ID]; have != nil && o.Generation < have.Generation {
		return "", ErrStale
	}
	b.barred[o.ID] = max(b.barred[o.ID], o.Generation)
	if b.there[o.ID] != nil {
		b.history = append(b.history, "withdraw")
	}
	delete(b.there, o.ID)
	return "", nil
}

// owners are those for which the VM's object is there; nil: it is not.
func (b *bus) owners(vm uuid.UUID) []uuid.UUID {
	b.mu.Lock()
	defer b.mu.Unlock()
	if o := b.there["nic-"+vm.String()]; o != nil {
		return slices.Clone(o.Owners)
	}
	return nil
}

func (b *bus) deadline(vm uuid.UUID) capabilities.Deadline {
	b.mu.Lock()
	defer b.mu.Unlock()
	if o := b.there["nic-"+vm.String()]; o != nil {
		return o.deadline
	}
	return capabilities.Deadline{}
}

func (b *bus) setFail(fail func(verb string, o Object) error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.fail = fail
}

func (b *bus) did() []string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return slices.Clone(b.history)
}

// busRig is a reconciler of a bus, with VMs that run as runs says.
type busRig struct {
	*rig
	bus  *bus
	mu   sync.Mutex
	runs map[uuid.UUID]string
}

func newBusRig(t *testing.T, b *bus) *busRig {
	base := newRig(t)
	base.r.Close()
	b.there, b.barred = map[string]*wired{}, map[string]uint64{}
	g := &busRig{rig: base, bus: b, runs: map[uuid.UUID]string{base.vm: "run"}}
	g.r = New(Options{
		Appliers: []Applier{b}, Ledger: g.l, Clock: g.clock, Sweep: time.Hour,
		Instances: func() map[uuid.UUID]string {
			g.mu.Lock()
			defer g.mu.Unlock()
			out := map[uuid.UUID]string{}
			for vm, run := range g.runs {
				out[vm] = run
			}
			return out
		},
	})
	return g
}

// begin puts the start of a VM on record, end its end; what the broker knows
// follows.
func (g *busRig) begin(vm uuid.UUID, run string) {
	g.append(ledger.Event{Type: ledger.VMStarted, Actor: ledger.Actor{Kind: ledger.ActorBroker}, VM: vm, Data: ledger.JSON(ledger.RunData{Instance: run})})
	g.mu.Lock()
	g.runs[vm] = run
	g.mu.Unlock()
	g.r.Wake(vm)
}

func (g *busRig) end(vm uuid.UUID) {
	g.mu.Lock()
	run := g.runs[vm]
	delete(g.runs, vm)
	g.mu.Unlock()
	g.append(ledger.Event{Type: ledger.VMExited, Actor: ledger.Actor{Kind: ledger.ActorBroker}, VM: vm, Data: ledger.JSON(ledger.RunData{Instance: run})})
	g.r.Wake(vm)
}

// eventually waits for something that no wake-up but those of the test brings
// about.
func eventually(t *testing.T, what string, is func() bool) {
	t.Helper()
	for end := time.Now().Add(20 * time.Second); !is(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("never: %s", what)
		}
	}
}

func (g *busRig) wantOwners(want ...uuid.UUID) {
	g.t.Helper()
	slices.SortFunc(want, byUUID)
	eventually(g.t, fmt.Sprintf("owners %v", want), func() bool { return slices.Equal(g.bus.owners(g.vm), want) })
}

// An object stays while one of its owners lives and goes with the last, and each
// of them is revoked when it has nothing of it, whether or not the world tells
// whose it is.
func TestSharedObject(t *testing.T) {
	for _, silent := range []bool{false, true} {
		t.Run(fmt.Sprintf("silent=%v", silent), func(t *testing.T) {
			g := newBusRig(t, &bus{silent: silent})
			long := capabilities.NewDeadline(g.clock.Now(), time.Hour)
			a := g.grant(func(r *ledger.GrantRecord) { r.Deadline = long })
			g.await(a, ledger.Active)
			b := g.grant(func(r *ledger.GrantRecord) { r.Deadline = capabilities.NewDeadline(g.clock.Now(), time.Minute) })
			g.await(b, ledger.Active)
			g.wantOwners(a, b)
			if got := g.bus.deadline(g.vm); got != long {
				t.Errorf("the object ends at %v, want its last owner's deadline %v", got, long)
			}
			c := g.grant(nil)
			g.await(c, ledger.Active)
			g.wantOwners(a, b, c)
			if got := g.bus.deadline(g.vm); !got.IsZero() {
				t.Errorf("the object ends at %v, although one of its owners does not", got)
			}
			g.revoke(c)
			g.await(c, ledger.Revoked)
			g.wantOwners(a, b)
			if got := g.bus.deadline(g.vm); got != long {
				t.Errorf("the object ends at %v, want %v again", got, long)
			}
			g.clock.Advance(time.Minute)
			g.r.Wake(g.vm)
			g.await(b, ledger.Revoked)
			g.wantOwners(a)
			g.await(a, ledger.Active)
			g.revoke(a)
			g.await(a, ledger.Revoked)
			g.wantOwners()
			want := []string{"apply 1", "apply 2", "apply 3", "apply 2", "apply 1", "withdraw"}
			if got := g.bus.did(); !slices.Equal(got, want) {
				t.Errorf("it did %v, want %v: an owner lost what it kept, or something was done twice", got, want)
			}
			again := g.grant(nil)
			g.await(again, ledger.Active)
			g.wantOwners(again)
		})
	}
}

// One of two owners is revoked, and the broker dies before that is on record as
// done: the next one finds out, and takes nothing from the other.
func TestSharedObjectAfterARestart(t *testing.T) {
	for _, silent := range []bool{false, true} {
		for _, done := range []bool{false, true} {
			t.Run(fmt.Sprintf("silent=%v,done=%v", silent, done), func(t *testing.T) {
				g := newBusRig(t, &bus{silent: silent})
				a, b := g.grant(nil), g.grant(nil)
				g.await(a, ledger.Active)
				g.await(b, ledger.Active)
				g.wantOwners(a, b)
				g.r.Close()
				g.revoke(b)
				if done {
					v := g.r.desire(corner{g.vm, "fs"})
					if _, err := g.bus.Apply(t.Context(), v.desired[0]); err != nil {
						t.Fatal(err)
					}
				}
				g.r = New(g.r.o)
				g.r.Wake(g.vm)
				g.await(b, ledger.Revoked)
				g.wantOwners(a)
				g.await(a, ledger.Active)
				if slices.Contains(g.bus.did(), "withdraw") {
					t.Errorf("it did %v", g.bus.did())
				}
			})
		}
	}
}

// One of two grants ends before their object is there: it is made for the other,
// also by a broker that knows nothing of that.
func TestSharedObjectThatIsNotThereYet(t *testing.T) {
	for _, restart := range []bool{false, true} {
		t.Run(fmt.Sprintf("restart=%v", restart), func(t *testing.T) {
			g := newBusRig(t, &bus{})
			down := func(verb string, _ Object) error {
				if verb == "apply" {
					return fmt.Errorf("nobody answers: %w", ErrTransient)
				}
				return nil
			}
			g.bus.setFail(down)
			a, b := g.grant(nil), g.grant(nil)
			eventually(t, "trouble", func() bool { return len(g.r.Troubles()) > 0 })
			g.revoke(b)
			g.await(b, ledger.Revoked)
			if restart {
				g.r.Close()
				g.r = New(g.r.o)
			}
			g.bus.setFail(nil)
			g.r.Wake(g.vm)
			g.await(a, ledger.Active)
			g.wantOwners(a)
			// What was meant for both comes late.
			v := g.r.desire(corner{g.vm, "fs"})
			late := v.desired[0]
			late.Owners = []uuid.UUID{a, b}
			g.l.View(func(s *ledger.State) {
				ended, _ := s.Grant(b)
				late.Generation = ended.Seq
			})
			if _, err := g.bus.Apply(t.Context(), late); !errors.Is(err, ErrStale) {
				t.Errorf("what came late: %v, want %v", err, ErrStale)
			}
			g.wantOwners(a)
		})
	}
}

// A grant that is refused when it joins others costs them nothing.
func TestRefusedNewcomer(t *testing.T) {
	g := newBusRig(t, &bus{})
	a := g.grant(nil)
	g.await(a, ledger.Active)
	g.bus.setFail(func(verb string, o Object) error {
		if verb == "apply" && len(o.Owners) > 1 {
			return errors.New("one is enough")
		}
		return nil
	})
	b := g.grant(nil)
	if got := g.await(b, ledger.Failed); got.Reason != "one is enough" {
		t.Errorf("the reason is %q", got.Reason)
	}
	g.wantOwners(a)
	g.await(a, ledger.Active)
	eventually(t, "settled", func() bool { ok, err := g.r.Settled(t.Context(), g.vm); return ok && err == nil })
}

// An object that cannot be taken from one owner alone is taken from all, and
// given back to who is left: access that has ended counts for more.
func TestReleaseThatFailsIsAWithdrawal(t *testing.T) {
	g := newBusRig(t, &bus{silent: true})
	a, b := g.grant(nil), g.grant(nil)
	g.await(a, ledger.Active)
	g.await(b, ledger.Active)
	g.wantOwners(a, b)
	g.bus.setFail(func(verb string, o Object) error {
		if verb == "apply" && len(g.bus.owners(g.vm)) == 2 {
			return errors.New("it does not let go")
		}
		return nil
	})
	g.revoke(b)
	g.await(b, ledger.Revoked)
	g.wantOwners(a)
	g.await(a, ledger.Active)
	if !slices.Contains(g.bus.did(), "withdraw") {
		t.Errorf("it did %v", g.bus.did())
	}
}

// Access to what others share is taken away although the ledger cannot be told.
func TestCutASharedObjectWithoutTheLedger(t *testing.T) {
	g := newBusRig(t, &bus{})
	disk := &failing{Ledger: g.l}
	g.r.o.Ledger = disk
	a, b := g.grant(nil), g.grant(nil)
	g.await(a, ledger.Active)
	g.await(b, ledger.Active)
	g.wantOwners(a, b)
	disk.full.Store(true)
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	if err := g.r.CutNow(ctx, []ledger.Grant{g.await(b, ledger.Active)}); err != nil {
		t.Fatal(err)
	}
	g.wantOwners(a)
	disk.full.Store(false)
	g.revoke(b)
	g.r.Unbar(b)
	g.r.Wake(g.vm)
	g.await(b, ledger.Revoked)
	g.await(a, ledger.Active)
	g.wantOwners(a)
}

// What needs another VM waits for it, is withdrawn when it ends, and is made
// again when it runs again; its grant lives through that. Only the start and the
// end of that VM wake it.
func TestNeedsAnotherVM(t *testing.T) {
	other := uuid.New()
	g := newBusRig(t, &bus{needs: other})
	id := g.grant(nil)
	var plan []Action
	eventually(t, "a plan that waits", func() bool {
		plan, _ = g.r.Preview(t.Context(), g.vm)
		return len(plan) == 1 && plan[0].Verb == Wait
	})
	if want := "it needs VM " + other.String() + ", which does not run"; plan[0].Why != want {
		t.Errorf("it waits because %q, want %q", plan[0].Why, want)
	}
	if settled, err := g.r.Settled(t.Context(), g.vm); err != nil || !settled {
		t.Errorf("what waits for another VM is settled: %v, %v", settled, err)
	}
	g.await(id, ledger.Pending)
	for i := range 3 {
		g.begin(other, fmt.Sprint("other-", i))
		g.wantOwners(id)
		g.await(id, ledger.Active)
		g.end(other)
		g.wantOwners()
	}
	g.await(id, ledger.Active)
	g.revoke(id)
	g.await(id, ledger.Revoked)
	g.begin(other, "again")
	if got := g.bus.owners(g.vm); got != nil {
		t.Errorf("it is there for %v", got)
	}
}

// A VM that something needs restarts between two looks: what was made with its
// last run is made anew.
func TestNeededVMRestartsUnseen(t *testing.T) {
	other := uuid.New()
	g := newBusRig(t, &bus{needs: other})
	g.begin(other, "one")
	id := g.grant(nil)
	g.await(id, ledger.Active)
	g.wantOwners(id)
	for _, e := range []ledger.Event{
		{Type: ledger.VMExited, Data: ledger.JSON(ledger.RunData{Instance: "one"})},
		{Type: ledger.VMStarted, Data: ledger.JSON(ledger.RunData{Instance: "two"})},
	} {
		e.Actor, e.VM = ledger.Actor{Kind: ledger.ActorBroker}, other
		if _, err := g.l.Update(t.Context(), func(tx *ledger.Tx) error { return tx.Append(e) }); err != nil {
			t.Fatal(err)
		}
	}
	g.mu.Lock()
	g.runs[other] = "two"
	g.mu.Unlock()
	g.r.Wake(other)
	eventually(t, "it is made anew", func() bool { return len(g.bus.did()) == 2 })
	g.await(id, ledger.Active)
}

// What a guest lost is not given back to it, also where the object needs another
// VM.
func TestLostAlthoughItNeedsAnotherVM(t *testing.T) {
	other := uuid.New()
	g := newBusRig(t, &bus{needs: other})
	g.begin(other, "one")
	id := g.grant(nil)
	g.await(id, ledger.Active)
	g.bus.mu.Lock()
	clear(g.bus.there)
	g.bus.mu.Unlock()
	g.r.Wake(g.vm)
	g.await(id, ledger.Revoked)
	if got := g.bus.did(); len(got) != 1 {
		t.Errorf("it did %v", got)
	}
}
