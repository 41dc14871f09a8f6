package reconcile

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/google/uuid"

	"spectrum-os.org/broker/broker/ledger"
	"spectrum-os.org/broker/failpoint"
)

// application is an Apply under way.
type application struct {
	action Action
	run    string
	cancel context.CancelFunc
}

// applyPass begins to make what live grants need. It waits for none of it.
func (r *Reconciler) applyPass(ctx context.Context, c corner) error {
	if r.quiet(c) {
		if idle, err := r.idle(ctx, c); err != nil || idle {
			return err
		}
	}
	v, err := r.look(ctx, c)
	if err != nil {
		return err
	}
	slots := r.laneOf(c).slots
	for _, a := range v.plan {
		if a.Verb == Apply {
			r.begin(a, v.instances[c.vm], v.began, slots)
		}
	}
	return nil
}

// begin begins an application, unless it is under way, or the object is just
// being taken away, or pauses after a failure: the end of each wakes the VM. A
// newer one takes the place of an older one. What was made since the look that it
// was planned from may need it no more: it is looked at again.
func (r *Reconciler) begin(a Action, run string, planned uint64, slots chan struct{}) {
	id := a.Object.ID
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.made[id] > planned {
		r.wg.Go(func() { r.wake(corner{a.Object.VM, a.Object.Kind}) })
		return
	}
	if r.cutting[id] != nil || r.troubles[id].pauses(a, run) {
		return
	}
	if p := r.applying[id]; p != nil {
		if p.action.Object.Generation >= a.Object.Generation && p.run == run {
			return
		}
		p.cancel()
	}
	ctx, cancel := context.WithCancel(r.ctx)
	p := &application{action: a, run: run, cancel: cancel}
	r.applying[id] = p
	r.wg.Go(func() {
		defer cancel()
		r.doApply(ctx, p, slots)
	})
}

func (r *Reconciler) doApply(ctx context.Context, p *application, slots chan struct{}) {
	a := p.action
	id, vm := a.Object.ID, a.Object.VM
	var note string
	err := ErrNotNow
	release := take(ctx, slots, r.o.Patience)
	if release != nil {
		if err = r.entitle(ctx, a.Object); err == nil {
			note, err = r.make(ctx, a)
		}
		release()
	}
	if r.ctx.Err() != nil {
		return // the broker stops; the next one finishes or undoes
	}
	overtaken := ctx.Err() != nil
	made := err == nil
	if errors.Is(err, ErrStale) && !overtaken {
		var newest uint64
		r.o.Ledger.View(func(s *ledger.State) { newest = s.Seq() })
		r.mu.Lock()
		r.floors[id] = max(r.floors[id], newest)
		r.mu.Unlock()
		err = fmt.Errorf("%w: %w", ErrTransient, err)
	}
	if err == nil && !overtaken {
		r.mu.Lock()
		r.seen[id] = sight{a.Object.Instance, a.Object.Generation}
		r.mu.Unlock()
		r.mend(id)
		r.o.Log.Info("applied", "object", id, "vm", vm, "why", a.Why, "note", note)
		err = r.recordMade(ctx, a.Object, note)
	} else if err != nil && !overtaken && !errors.Is(err, ErrNotNow) && !transient(err) {
		r.o.Log.Warn("cannot apply", "object", id, "vm", vm, "err", err)
		r.o.Meter.Failed(a.Object.Kind, string(Apply))
		r.mend(id)
		err = r.recordFailed(ctx, a.Object, err)
		// Whatever was made of it before it failed has no owner now.
		defer r.Wake(vm)
	}
	switch {
	case err == nil || overtaken:
	case errors.Is(err, ErrNotNow):
		r.o.Log.Debug("not applied yet", "object", id, "vm", vm, "why", err)
	default:
		pause := r.fail(ctx, a, p.run, err, longestPause)
		time.AfterFunc(pause, func() { r.wake(corner{vm, a.Object.Kind}) })
	}
	r.mu.Lock()
	if r.applying[id] == p {
		delete(r.applying, id)
		if r.moments++; made {
			r.made[id] = r.moments
		}
	}
	r.mu.Unlock()
	if overtaken || errors.Is(err, errOutdated) {
		r.wake(corner{vm, a.Object.Kind})
	}
}

// take waits for a slot, which is given back when release is called, or after
// patience: who hangs must not keep others from beginning. It is nil where ctx
// ended before.
func take(ctx context.Context, slots chan struct{}, patience time.Duration) (release func()) {
	select {
	case slots <- struct{}{}:
	case <-ctx.Done():
		return nil
	}
	give := time.AfterFunc(patience, func() { <-slots })
	return func() {
		if give.Stop() {
			<-slots
		}
	}
}

// errOutdated says that a plan is behind the ledger.
var errOutdated = fmt.Errorf("a grant that owns it has ended: %w", ErrNotNow)

// entitle makes sure that each owner of an object may have it, and charges what
// that costs. It fails with errOutdated where one may not: the plan may be minutes
// old, and another one is made without it. Who revokes from here on finds the
// application and cancels it.
func (r *Reconciler) entitle(ctx context.Context, o Object) error {
	if len(r.live(o)) == len(o.Owners) {
		if _, err := r.charge(ctx, o); err != nil {
			return fmt.Errorf("%w: %w", ErrTransient, err)
		}
		if len(r.entitled(o)) == len(o.Owners) {
			return nil
		}
	}
	return errOutdated
}

// live are the owners of an object that are in force.
func (r *Reconciler) live(o Object) (out []uuid.UUID) {
	r.o.Ledger.View(func(s *ledger.State) {
		for _, id := range o.Owners {
			if r.Live(s, id) == nil {
				out = append(out, id)
			}
		}
	})
	return out
}

// entitled are those of them that were charged what a use in this run costs.
func (r *Reconciler) entitled(o Object) (out []uuid.UUID) {
	live := r.live(o)
	r.o.Ledger.View(func(s *ledger.State) {
		for _, id := range live {
			if g, _ := s.Grant(id); g.Limits.MaxUses == nil || s.Charged(id, o.Instance) {
				out = append(out, id)
			}
		}
	})
	return out
}

func (r *Reconciler) make(ctx context.Context, a Action) (note string, err error) {
	limited, cancel := context.WithTimeout(ctx, r.o.ApplyTimeout)
	defer cancel()
	failpoint.Hit("apply.before")
	note, err = r.appliers[a.Object.Kind].Apply(limited, a.Object)
	failpoint.Hit("apply.after")
	if err == nil {
		r.setMissed(a.Object.ID, note != "" && limited.Err() == nil)
	}
	return note, err
}

// overtake ends what still waits for an object that something was taken from,
// such as an agent's answer.
func (r *Reconciler) overtake(a Action) {
	id := a.Object.ID
	r.mu.Lock()
	defer r.mu.Unlock()
	if a.Verb == Withdraw {
		delete(r.missed, id)
		delete(r.caughtUp, id)
		delete(r.seen, id)
		delete(r.made, id)
		if a.again == 0 {
			delete(r.floors, id)
		}
	} else {
		r.seen[id] = sight{a.Object.Instance, a.Object.Generation}
	}
	if p := r.applying[id]; p != nil && p.action.Object.Generation <= a.Object.Generation {
		p.cancel()
	}
}

// recordMade makes the pending owners of an object active.
func (r *Reconciler) recordMade(ctx context.Context, o Object, note string) error {
	events := r.recovered(o.Owners)
	for _, g := range r.owners(o, ledger.Pending) {
		events = append(events, ledger.NewChange(ledger.GrantActive, ledger.Actor{Kind: ledger.ActorBroker}, g,
			ledger.Change{Reason: note, Instance: o.Instance}))
	}
	return r.append(ctx, events)
}

// recordFailed ends the grants for which an object could not be made: those that
// wait for it, or, where none does, those that had it.
func (r *Reconciler) recordFailed(ctx context.Context, o Object, err error) error {
	var events []ledger.Event
	pending := r.owners(o, ledger.Pending)
	for _, g := range pending {
		r.remember(g, err)
		events = append(events, change(ledger.GrantFailed, g, err.Error()))
	}
	if len(pending) == 0 {
		for _, g := range r.owners(o, ledger.Active) {
			events = append(events, change(ledger.GrantRevoking, g, err.Error()))
		}
	}
	return r.append(ctx, events)
}

func (r *Reconciler) owners(o Object, state ledger.GrantState) (out []uuid.UUID) {
	r.o.Ledger.View(func(s *ledger.State) {
		for _, id := range o.Owners {
			if g, _ := s.Grant(id); g.State == state {
				out = append(out, id)
			}
		}
	})
	return out
}
