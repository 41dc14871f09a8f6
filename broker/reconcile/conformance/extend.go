package conformance

import (
	"errors"
	"time"

	"spectrum-os.org/broker/broker/reconcile"
	"spectrum-os.org/broker/capabilities"
	"spectrum-os.org/broker/clock"
)

// extender is the applier where it moves deadlines; the laws of extensions are
// for those that do.
func (r *rig) extender() reconcile.Extender {
	e, ok := r.a.(reconcile.Extender)
	if !ok {
		r.Skip("it moves no deadlines: what is renewed is applied again")
	}
	return e
}

// leased is an object that ends so long from now.
func (r *rig) leased(name string, generation uint64, ttl time.Duration) reconcile.Object {
	o := r.Object(name, generation)
	o.Deadline = capabilities.NewDeadline(clock.System{}.Now(), ttl)
	return o
}

// ends asserts what is seen of an object's end.
func (r *rig) ends(o reconcile.Object) {
	r.Helper()
	if seen := r.observe()[o.ID]; !seen.Deadline.Equal(o.Deadline) {
		r.Errorf("%s is seen to end at %v, want %v", o.ID, seen.Deadline, o.Deadline)
	}
}

// extend: another deadline is no other thing, and is seen, also by the next
// applier.
func extend(r *rig) {
	e := r.extender()
	o := r.leased("a", 1, time.Hour)
	r.apply(o)
	r.ends(o)
	before := r.World()[o.ID].Identity
	later := r.leased("a", 2, 2*time.Hour)
	for range 2 {
		if err := e.Extend(r.ctx(), later); err != nil {
			r.Fatal(err)
		}
	}
	r.restart()
	r.only(later)
	r.ends(later)
	if now := r.World()[o.ID].Identity; now != before {
		r.Errorf("%s was given a later deadline and is another thing: %s was %s", o.ID, now, before)
	}
}

func extendOlder(r *rig) {
	e := r.extender()
	o := r.leased("a", 3, time.Hour)
	r.apply(o)
	r.stale(e.Extend(r.ctx(), r.leased("a", 2, 2*time.Hour)), "an older extension that arrives late")
	r.only(o)
	r.ends(o)
	newer := r.leased("a", 4, 2*time.Hour)
	if err := e.Extend(r.ctx(), newer); err != nil {
		r.Fatal(err)
	}
	_, err := r.a.Withdraw(r.ctx(), o)
	r.stale(err, "a withdrawal that is older than an extension")
	r.only(newer)
}

// extendWhatHasEnded: an extension makes nothing, and brings nothing back.
func extendWhatHasEnded(r *rig) {
	e := r.extender()
	tooLate := func(o reconcile.Object, what string) {
		r.Helper()
		if err := e.Extend(r.ctx(), o); !errors.Is(err, reconcile.ErrTooLate) {
			r.Errorf("%s: %v, want that it is too late", what, err)
		}
		r.only()
	}
	tooLate(r.leased("a", 1, time.Hour), "what never was")
	r.apply(r.leased("a", 2, time.Hour))
	r.withdraw(r.Object("a", 3))
	tooLate(r.leased("a", 4, time.Hour), "what was withdrawn")
	r.apply(r.leased("b", 1, time.Hour))
	if err := e.Extend(r.ctx(), r.leased("b", 2, 0)); !errors.Is(err, reconcile.ErrTooLate) {
		r.Errorf("to a deadline that has passed: %v", err)
	}
}
