// Package conformance holds every applier to the same laws. It is for tests.
//
// Its laws are those of [reconcile.Applier]: applying and withdrawing are
// idempotent, whoever does it again and whenever the one before stopped; an
// older generation that arrives late is refused and changes nothing; a
// withdrawal leaves nothing that gives access; and an observation tells what the
// world has, never what an applier remembers.
//
// What is there is asked of [Harness.World], not of the applier under test.
package conformance

import (
	"context"
	"errors"
	"fmt"
	"reflect"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"

	"spectrum-os.org/broker/broker/reconcile"
	"spectrum-os.org/broker/capabilities"
)

// Thing is something in the world that gives a VM access.
type Thing struct {
	Generation uint64
	// Identity tells this thing from one that took its place, such as the
	// process that serves it.
	Identity string
}

// Harness is a world of one kind of object, with one VM that runs.
type Harness struct {
	// New returns an applier as a broker has that has just started.
	New func() reconcile.Applier
	// Object is an object for the VM's present run: for one name always the
	// same, but for its generation.
	Object func(name string, generation uint64) reconcile.Object
	// World is everything that gives access now, by object id. It does not ask
	// an applier.
	World func() map[string]Thing
	// Stale tells whether an error is the refusal of an older generation.
	Stale func(error) bool
	// Interrupt has, by name, each place in an Apply at which its caller can go
	// away. Each function makes the next Apply call leave when it gets there.
	Interrupt map[string]func(leave func())
	// InterruptWithdraw is the same for a Withdraw.
	InterruptWithdraw map[string]func(leave func())
	// Lose takes an object out of the world as a guest or a crash does, not by
	// an applier.
	Lose func(id string)
	// Reboot ends the VM's run and begins another.
	Reboot func()
	// Stop ends the VM.
	Stop func()
}

// Run holds an applier to the laws. make is called for each of them, with the
// test that the harness lives as long as.
func Run(t *testing.T, make func(t *testing.T) Harness) {
	for _, law := range []struct {
		name string
		hold func(*rig)
	}{
		{"ObjectsArePure", objectsArePure},
		{"Apply", apply},
		{"ApplyTwice", applyTwice},
		{"ApplyAtOnce", applyAtOnce},
		{"ApplyNewer", applyNewer},
		{"Withdraw", withdraw},
		{"WithdrawTwice", withdrawTwice},
		{"WithdrawAtOnce", withdrawAtOnce},
		{"WithdrawWithoutApply", withdrawWithoutApply},
		{"WithdrawOneOfTwo", withdrawOneOfTwo},
		{"OlderApplyAfterNewerApply", olderApplyAfterNewerApply},
		{"OlderApplyAfterNewerWithdraw", olderApplyAfterNewerWithdraw},
		{"OlderWithdrawAfterNewerApply", olderWithdrawAfterNewerApply},
		{"ApplyAgainAfterWithdraw", applyAgainAfterWithdraw},
		{"WithdrawOvertakesApply", withdrawOvertakesApply},
		{"CrashInApply", crashInApply},
		{"CrashInWithdraw", crashInWithdraw},
		{"CrashBeforeApplyIsRecorded", crashBeforeApplyIsRecorded},
		{"CrashBeforeWithdrawIsRecorded", crashBeforeWithdrawIsRecorded},
		{"ApplyAndWithdrawAtOnce", applyAndWithdrawAtOnce},
		{"CallersThatAreGone", callersThatAreGone},
		{"CallersThatLeave", callersThatLeave},
		{"ObserveTellsTheWorld", observeTellsTheWorld},
		{"ObserveChangesNothing", observeChangesNothing},
		{"ObserveTellsOneVM", observeTellsOneVM},
		{"AnotherRun", anotherRun},
		{"StoppedVM", stoppedVM},
		{"Extend", extend},
		{"ExtendOlder", extendOlder},
		{"ExtendWhatHasEnded", extendWhatHasEnded},
	} {
		t.Run(law.name, func(t *testing.T) {
			h := make(t)
			law.hold(&rig{T: t, Harness: h, a: h.New()})
		})
	}
}

// rig is one law's harness and the applier that it looks at.
type rig struct {
	*testing.T
	Harness
	a reconcile.Applier
}

// limit is far longer than any step takes.
const limit = 30 * time.Second

func (r *rig) ctx() context.Context {
	ctx, cancel := context.WithTimeout(r.Context(), limit)
	r.Cleanup(cancel)
	return ctx
}

func (r *rig) apply(o reconcile.Object) {
	r.Helper()
	if _, err := r.a.Apply(r.ctx(), o); err != nil {
		r.Fatalf("cannot apply generation %d: %v", o.Generation, err)
	}
}

func (r *rig) withdraw(o reconcile.Object) {
	r.Helper()
	if _, err := r.a.Withdraw(r.ctx(), o); err != nil {
		r.Fatalf("cannot withdraw generation %d: %v", o.Generation, err)
	}
}

// stale asserts that an error refuses an older generation. It must not say
// "not now": that would be tried again for ever.
func (r *rig) stale(err error, what string) {
	r.Helper()
	if err == nil || !r.Stale(err) || errors.Is(err, reconcile.ErrNotNow) {
		r.Errorf("%s: %v, want the refusal of an older generation", what, err)
	}
}

// only asserts that the world has these objects and nothing else, and that the
// applier sees the same.
func (r *rig) only(want ...reconcile.Object) {
	r.Helper()
	world := r.World()
	if len(world) != len(want) {
		r.Fatalf("the world has %v, want %d objects", world, len(want))
	}
	for _, o := range want {
		thing, ok := world[o.ID]
		if !ok || thing.Generation != o.Generation {
			r.Fatalf("the world has %v, want %s in generation %d", world, o.ID, o.Generation)
		}
	}
	seen := r.observe()
	for _, o := range want {
		got, ok := seen[o.ID]
		got.Detail, got.Deadline, got.Owners = "", capabilities.Deadline{}, nil
		is := reconcile.Observed{
			ID: o.ID, Kind: r.a.Kind(), VM: o.VM, Instance: o.Instance, Generation: o.Generation, Presence: reconcile.Present,
		}
		if !ok || !reflect.DeepEqual(got, is) {
			r.Fatalf("observed %+v, want %+v", got, is)
		}
		delete(seen, o.ID)
	}
	for _, o := range seen {
		if o.Presence != reconcile.Gone {
			r.Fatalf("observed %+v, which the world does not have", o)
		}
	}
}

func (r *rig) observe() map[string]reconcile.Observed {
	r.Helper()
	seen, err := r.a.Observe(r.ctx(), r.Object("vm", 1).VM)
	if err != nil {
		r.Fatalf("cannot observe: %v", err)
	}
	out := map[string]reconcile.Observed{}
	for _, o := range seen {
		if _, twice := out[o.ID]; twice {
			r.Fatalf("%s is observed twice: %+v", o.ID, seen)
		}
		out[o.ID] = o
	}
	return out
}

// restart replaces the applier, as a restart of the broker does.
func (r *rig) restart() { r.a = r.New() }

func objectsArePure(r *rig) {
	a, b := r.Object("a", 1), r.Object("a", 2)
	if a.ID != b.ID || a.VM != b.VM || a.Kind != r.a.Kind() {
		r.Errorf("generations of one object: %+v and %+v", a, b)
	}
	if other := r.Object("b", 1); other.ID == a.ID {
		r.Errorf("two objects share the id %s", a.ID)
	}
	if w := r.World(); len(w) != 0 {
		r.Errorf("naming objects made %v", w)
	}
}

func apply(r *rig) {
	r.only()
	a := r.Object("a", 1)
	r.apply(a)
	r.only(a)
}

func applyTwice(r *rig) {
	a := r.Object("a", 1)
	r.apply(a)
	before := r.World()[a.ID]
	r.apply(a)
	r.only(a)
	r.restart()
	r.apply(a)
	r.only(a)
	if after := r.World()[a.ID]; after != before {
		r.Errorf("applied again it is %v, not %v: what the guest had was taken away", after, before)
	}
}

func applyAtOnce(r *rig) {
	a := r.Object("a", 1)
	ctx := r.ctx()
	errs := atOnce(8, func() error {
		_, err := r.a.Apply(ctx, a)
		return err
	})
	if err := errors.Join(errs...); err != nil {
		r.Errorf("cannot apply at once: %v", err)
	}
	r.only(a)
}

func applyNewer(r *rig) {
	a, b := r.Object("a", 1), r.Object("a", 2)
	r.apply(a)
	before := r.World()[a.ID]
	r.apply(b)
	r.only(b)
	if after := r.World()[a.ID]; after.Identity != before.Identity {
		r.Errorf("a newer generation of the same made %v of %v", after, before)
	}
}

func withdraw(r *rig) {
	a := r.Object("a", 1)
	r.apply(a)
	r.withdraw(a)
	r.only()
}

func withdrawTwice(r *rig) {
	a := r.Object("a", 1)
	r.apply(a)
	a.Generation = 2 // the end of a grant is a generation of its own
	r.withdraw(a)
	r.withdraw(a)
	r.only()
	r.restart()
	r.withdraw(a)
	r.only()
}

func withdrawAtOnce(r *rig) {
	a := r.Object("a", 1)
	r.apply(a)
	ctx := r.ctx()
	errs := atOnce(8, func() error {
		_, err := r.a.Withdraw(ctx, a)
		// Each that returns says that nothing is left.
		if w := r.World(); err == nil && len(w) != 0 {
			err = fmt.Errorf("withdrawn, and the world has %v", w)
		}
		return err
	})
	if err := errors.Join(errs...); err != nil {
		r.Error(err)
	}
	r.only()
}

func withdrawWithoutApply(r *rig) {
	r.withdraw(r.Object("a", 2))
	r.only()
	for _, late := range []uint64{1, 2} {
		_, err := r.a.Apply(r.ctx(), r.Object("a", late))
		r.stale(err, fmt.Sprintf("generation %d after the withdrawal of 2", late))
	}
	r.only()
	r.apply(r.Object("a", 3))
	r.only(r.Object("a", 3))
}

func withdrawOneOfTwo(r *rig) {
	a, b := r.Object("a", 1), r.Object("b", 1)
	r.apply(a)
	r.apply(b)
	r.only(a, b)
	before := r.World()[b.ID]
	r.withdraw(a)
	r.only(b)
	if after := r.World()[b.ID]; after != before {
		r.Errorf("the withdrawal of another made %v of %v", after, before)
	}
}

func olderApplyAfterNewerApply(r *rig) {
	newer := r.Object("a", 3)
	r.apply(newer)
	before := r.World()
	for _, restart := range []bool{false, true} {
		if restart {
			r.restart()
		}
		_, err := r.a.Apply(r.ctx(), r.Object("a", 2))
		r.stale(err, "an older application")
		r.only(newer)
		if after := r.World(); after[newer.ID] != before[newer.ID] {
			r.Errorf("the refused application made %v of %v", after, before)
		}
	}
}

func olderApplyAfterNewerWithdraw(r *rig) {
	a := r.Object("a", 1)
	r.apply(a)
	r.withdraw(r.Object("a", 3))
	for _, late := range []uint64{1, 2, 3} {
		_, err := r.a.Apply(r.ctx(), r.Object("a", late))
		r.stale(err, fmt.Sprintf("generation %d after the withdrawal of 3", late))
		r.only()
	}
	// What was withdrawn stays so for a broker that remembers nothing.
	r.restart()
	_, err := r.a.Apply(r.ctx(), a)
	r.stale(err, "generation 1 by another broker")
	r.only()
	// A withdrawal that is older still takes nothing of that back.
	r.withdraw(a)
	_, err = r.a.Apply(r.ctx(), r.Object("a", 2))
	r.stale(err, "generation 2 after the withdrawals of 3 and 1")
	r.only()
}

func olderWithdrawAfterNewerApply(r *rig) {
	newer := r.Object("a", 3)
	r.apply(newer)
	before := r.World()
	_, err := r.a.Withdraw(r.ctx(), r.Object("a", 2))
	r.stale(err, "an older withdrawal")
	r.only(newer)
	if after := r.World(); after[newer.ID] != before[newer.ID] {
		r.Errorf("the refused withdrawal made %v of %v", after, before)
	}
	r.withdraw(newer)
	r.only()
}

func applyAgainAfterWithdraw(r *rig) {
	for generation := range uint64(3) {
		a := r.Object("a", 2*generation+1)
		r.apply(a)
		r.only(a)
		a.Generation++
		r.withdraw(a)
		r.only()
	}
}

// withdrawOvertakesApply has a withdrawal come while the application that it
// ends is under way, sooner or later. Whoever was first, nothing is left.
func withdrawOvertakesApply(r *rig) {
	for i := range 6 {
		name := fmt.Sprintf("o%d", i)
		o, ctx := r.Object(name, 1), r.ctx()
		var wg sync.WaitGroup
		wg.Go(func() {
			_, err := r.a.Apply(ctx, o)
			if errors.Is(err, reconcile.ErrNotNow) {
				r.Errorf("an application that was overtaken says %v", err)
			}
		})
		time.Sleep(time.Duration(i) * 4 * time.Millisecond)
		if _, err := r.a.Withdraw(r.ctx(), r.Object(name, 2)); err != nil {
			r.Errorf("cannot withdraw what is being applied: %v", err)
		}
		// It is said to be gone now, not once the application has ended.
		if thing, ok := r.World()[o.ID]; ok {
			r.Errorf("withdrawn, and the world has %v", thing)
		}
		wg.Wait()
		r.only()
		_, err := r.a.Apply(r.ctx(), o)
		r.stale(err, "the overtaken application, again")
		r.only()
	}
}

// crashInApply has the broker die at each place of an application; the next one
// looks, and applies or withdraws.
func crashInApply(r *rig) {
	for _, place := range sorted(r.Interrupt) {
		r.Run(place, func(t *testing.T) {
			r := &rig{T: t, Harness: r.Harness, a: r.New()}
			a, b := r.Object(place+"-a", 1), r.Object(place+"-b", 1)
			r.leave(r.Interrupt[place], func(ctx context.Context) { _, _ = r.a.Apply(ctx, a) })
			r.leave(r.Interrupt[place], func(ctx context.Context) { _, _ = r.a.Apply(ctx, b) })
			r.restart()
			for id, o := range r.observe() {
				if _, there := r.World()[id]; o.Presence == reconcile.Present && !there {
					r.Errorf("observed %+v, which the world does not have", o)
				}
			}
			r.apply(a)
			b.Generation = 2
			r.withdraw(b)
			r.only(a)
			_, err := r.a.Apply(r.ctx(), r.Object(place+"-b", 1))
			r.stale(err, "what the dead broker had begun")
			r.only(a)
			a.Generation = 2
			r.withdraw(a)
			r.only()
		})
	}
}

func crashInWithdraw(r *rig) {
	for _, place := range sorted(r.InterruptWithdraw) {
		r.Run(place, func(t *testing.T) {
			r := &rig{T: t, Harness: r.Harness, a: r.New()}
			a := r.Object(place, 1)
			r.apply(a)
			a.Generation = 2
			r.leave(r.InterruptWithdraw[place], func(ctx context.Context) { _, _ = r.a.Withdraw(ctx, a) })
			r.restart()
			r.withdraw(a)
			r.only()
			_, err := r.a.Apply(r.ctx(), r.Object(place, 1))
			r.stale(err, "what was withdrawn")
			r.only()
		})
	}
}

// leave makes a call whose caller goes away at a place, and returns then. The
// call may go on: nobody waits for it, as nobody does after a crash.
func (r *rig) leave(at func(leave func()), call func(ctx context.Context)) {
	r.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	left, returned := make(chan struct{}), make(chan struct{})
	var once sync.Once
	at(func() {
		cancel()
		once.Do(func() { close(left) })
	})
	go func() {
		defer close(returned)
		call(ctx)
	}()
	r.Cleanup(func() {
		cancel()
		<-returned
	})
	select {
	case <-left:
	case <-time.After(limit):
		r.Fatal("the call never gets to where its caller shall leave")
	}
}

func observeTellsTheWorld(r *rig) {
	a, b := r.Object("a", 1), r.Object("b", 1)
	r.apply(a)
	r.apply(b)
	r.Lose(a.ID)
	// The one who applied it knows of no loss, and tells it all the same.
	r.only(b)
	// One that applied nothing tells what is there.
	r.restart()
	r.only(b)
	// What is lost can still be withdrawn.
	a.Generation = 2
	r.withdraw(a)
	r.only(b)
}

func observeChangesNothing(r *rig) {
	a := r.Object("a", 1)
	r.apply(a)
	before := r.World()
	for range 3 {
		r.restart()
		r.observe()
	}
	if after := r.World(); len(after) != 1 || after[a.ID] != before[a.ID] {
		r.Errorf("observing made %v of %v", after, before)
	}
}

func observeTellsOneVM(r *rig) {
	r.apply(r.Object("a", 1))
	seen, err := r.a.Observe(r.ctx(), uuid.New())
	if err != nil || len(seen) != 0 {
		r.Errorf("a VM that is not there has %+v, %v", seen, err)
	}
}

// anotherRun has the VM reboot: nothing passes to the next run, and what was
// meant for the one before is not given to it.
func anotherRun(r *rig) {
	a := r.Object("a", 1)
	r.apply(a)
	r.Reboot()
	r.only()
	_, err := r.a.Apply(r.ctx(), a)
	if !errors.Is(err, reconcile.ErrNotNow) {
		r.Errorf("applied to a run that is over: %v, want %v", err, reconcile.ErrNotNow)
	}
	r.only()
	next := r.Object("a", 1)
	if next.Instance == a.Instance {
		r.Fatalf("both runs are %q", next.Instance)
	}
	r.apply(next)
	r.only(next)
}

func stoppedVM(r *rig) {
	a := r.Object("a", 1)
	r.apply(a)
	r.Stop()
	if w := r.World(); len(w) != 0 {
		r.Errorf("a VM that has stopped leaves %v", w)
	}
	_, err := r.a.Apply(r.ctx(), r.Object("b", 1))
	if !errors.Is(err, reconcile.ErrNotNow) {
		r.Errorf("applied to a VM that does not run: %v, want %v", err, reconcile.ErrNotNow)
	}
	if _, err := r.a.Withdraw(r.ctx(), a); err != nil {
		r.Errorf("withdrawn from a VM that does not run: %v", err)
	}
	seen, err := r.a.Observe(r.ctx(), a.VM)
	if err != nil && !errors.Is(err, reconcile.ErrNotNow) {
		r.Errorf("cannot observe a VM that does not run: %v", err)
	}
	for _, o := range seen {
		if o.Presence != reconcile.Gone {
			r.Errorf("a VM that does not run has %+v", o)
		}
	}
	if w := r.World(); len(w) != 0 {
		r.Errorf("a VM that has stopped has %v", w)
	}
}

// atOnce calls do n times at once.
func atOnce(n int, do func() error) []error {
	errs := make([]error, n)
	var wg sync.WaitGroup
	for i := range n {
		wg.Go(func() { errs[i] = do() })
	}
	wg.Wait()
	return errs
}

func sorted(m map[string]func(func())) []string {
	names := make([]string, 0, len(m))
	for name := range m {
		names = append(names, name)
	}
	slices.Sort(names)
	return names
}
