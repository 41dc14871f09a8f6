package reconcile

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/google/uuid"

	"spectrum-os.org/broker/broker/ledger"
	"spectrum-os.org/broker/failpoint"
)

// cutPass records which grants have ended, and orders every withdrawal that is
// not under way yet. It waits for none of them: a later revocation never waits
// for what an earlier one takes from the guest.
func (r *Reconciler) cutPass(ctx context.Context, c corner) error {
	quiet := r.quiet(c)
	var unrecorded error
	if !quiet {
		// What is known to have ended does not wait for a look at the world either.
		unrecorded = r.cutKnown(ctx, c)
	}
	if quiet {
		idle, err := r.idle(ctx, c)
		if err != nil {
			r.o.Meter.Failed(c.kind, "observe")
		}
		if idle {
			// Its own run wakes it before another VM's can matter to it.
			r.needs(view{corner: c})
		}
		if err != nil || idle {
			return err
		}
	}
	v, err := r.look(ctx, c)
	if err != nil {
		r.o.Meter.Failed(c.kind, "observe")
		return errors.Join(unrecorded, r.recordGone(ctx, c), err)
	}
	ended, err := r.recordEnds(ctx, v, lostObjects(v))
	switch {
	case err != nil:
		unrecorded = errors.Join(unrecorded, err)
		r.o.Log.Error("cannot record that grants ended; cutting access all the same", "vm", c.vm, "err", err)
	case ended:
		if v, err = r.look(ctx, c); err != nil {
			return err
		}
	}
	r.parted(v)
	r.forget(v)
	there := v.seen()
	for _, a := range v.plan {
		switch o, seen := there[a.Object.ID]; {
		case a.Verb == Apply:
			poke(r.laneOf(c).apply)
		case a.Verb.Cuts() && (seen && o.Presence != Gone || !r.isCut(a)):
			// What was withdrawn already waits only for the ledger.
			r.order(a, v.instances[c.vm])
		}
	}
	r.extendAll(v.plan)
	return errors.Join(unrecorded, r.recordGone(ctx, c))
}

// cutKnown orders the withdrawals that follow from the ledger alone.
func (r *Reconciler) cutKnown(ctx context.Context, c corner) error {
	v := r.desire(c)
	// A grant that died of itself (its lease, an ancestor) is recorded as revoking
	// before it is cut, so that the order on record is the order in the world.
	ended, err := r.recordEnds(ctx, v, nil)
	switch {
	case err != nil:
		// It must be cut even where that cannot be recorded.
		r.o.Log.Error("cannot record that grants ended; cutting access all the same", "vm", c.vm, "err", err)
	case ended:
		v = r.desire(c)
	}
	shared := make(map[string]bool, len(v.desired))
	for _, d := range v.desired {
		shared[d.ID] = true
	}
	for _, a := range Plan(v.desired, v.ending, nil, v.instances, r.o.Clock.Now()) {
		if a.Verb == Withdraw && !shared[a.Object.ID] && !r.isCut(a) {
			a.Object.Generation = max(a.Object.Generation, r.seenIn(a.Object.ID).generation)
			r.order(a, v.instances[c.vm])
		}
	}
	return err
}

func (r *Reconciler) seenIn(object string) sight {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.seen[object]
}

// cutting is a step under way that takes something away.
type cutting struct {
	action Action
	run    string
	cancel context.CancelFunc
	// resting: it failed, and waits before the VM is looked at again.
	resting bool
}

// order begins a step that takes something away, unless it is under way, or
// pauses after a failure. A newer one takes the place of an older one.
func (r *Reconciler) order(a Action, run string) {
	const gentle = 3
	id := a.Object.ID
	r.mu.Lock()
	defer r.mu.Unlock()
	if t := r.troubles[id]; a.Verb == Release && t != nil && t.Verb.Cuts() && t.Attempts >= gentle {
		// Access that has ended counts for more than access that goes on. It is
		// made again for who is left.
		a = a.past("it cannot be taken from a grant that has ended without taking it from all")
	}
	if a.again > 0 {
		r.floors[id] = max(r.floors[id], a.again)
	}
	if w := r.cutting[id]; w != nil {
		same := w.action.Object.Generation >= a.Object.Generation && w.action.Verb == a.Verb && covers(w.action.Ended, a.Ended)
		if same && (!w.resting || r.troubles[id].pauses(a, run)) {
			return
		}
		w.cancel()
	} else {
		r.busy[a.corner()]++
	}
	ctx, cancel := context.WithCancel(r.ctx)
	w := &cutting{action: a, run: run, cancel: cancel}
	r.cutting[id] = w
	r.wg.Go(func() {
		defer cancel()
		r.doCut(ctx, w)
	})
}

// covers tells whether all, which is sorted, has all of some.
func covers(all, some []uuid.UUID) bool {
	return !slices.ContainsFunc(some, func(id uuid.UUID) bool { return !among(all, id) })
}

func (r *Reconciler) doCut(ctx context.Context, w *cutting) {
	a := w.action
	id, vm := a.Object.ID, a.Object.VM
	failpoint.Hit("withdraw.before")
	note, err := r.takeAway(ctx, a)
	failpoint.Hit("withdraw.after")
	if err == nil {
		r.o.Log.Info("withdrawn", "object", id, "vm", vm, "verb", a.Verb, "why", a.Why, "note", note)
		r.mend(id)
		r.markCut(a, note)
		if err = r.recordGone(ctx, a.corner()); err != nil {
			err = fmt.Errorf("it is done, and the ledger cannot be told: %w", err)
		}
		failpoint.Hit("withdraw.recorded")
	}
	if err != nil && ctx.Err() == nil {
		pause := r.fail(ctx, a, w.run, err, longestPause)
		r.rest(ctx, w, pause)
	}
	r.mu.Lock()
	current := r.cutting[id] == w
	if current {
		delete(r.cutting, id)
		if r.busy[a.corner()]--; r.busy[a.corner()] == 0 {
			delete(r.busy, a.corner())
		}
	}
	r.mu.Unlock()
	if current && (a.Verb == Withdraw || err != nil) {
		r.Wake(vm)
	}
}

func (r *Reconciler) takeAway(ctx context.Context, a Action) (note string, err error) {
	ctx, cancel := context.WithTimeout(ctx, r.o.WithdrawTimeout)
	defer cancel()
	applier := r.appliers[a.Object.Kind]
	if a.Verb == Release {
		// Who has just joined the others is charged as with any application, and
		// left out where that cannot be.
		_, unpaid := r.charge(ctx, a.Object)
		if unpaid != nil {
			r.o.Log.Warn("cannot charge a use", "object", a.Object.ID, "err", unpaid)
		}
		a.Object.Owners = r.entitled(a.Object)
	}
	if a.Verb == Release && len(a.Object.Owners) > 0 {
		// Its note says how it is made for the others; nothing was done by force.
		_, err = applier.Apply(ctx, a.Object)
	} else {
		note, err = applier.Withdraw(ctx, a.Object)
	}
	if err == nil {
		r.overtake(a)
	}
	return note, err
}

// rest waits after a failure. Whoever finds it resting may begin another step,
// unless the pause is meant for that too.
func (r *Reconciler) rest(ctx context.Context, w *cutting, pause time.Duration) {
	r.mu.Lock()
	w.resting = true
	r.mu.Unlock()
	timer := time.NewTimer(pause)
	defer timer.Stop()
	select {
	case <-ctx.Done():
	case <-timer.C:
	}
}

// lostObjects are those that live grants own and the world has lost.
func lostObjects(v view) map[string]Observed {
	gone := map[string]Observed{}
	for _, o := range v.observed {
		if o.Presence == Gone {
			gone[o.ID] = o
		}
	}
	lost := map[string]Observed{}
	for _, d := range v.desired {
		if o, ok := gone[d.ID]; ok && o.Generation >= d.Generation {
			lost[d.ID] = o
		}
	}
	return lost
}

// endReason says why a grant that the ledger holds to be pending or active has
// ended all the same. Who barred one records that.
func (r *Reconciler) endReason(v view, lost map[string]Observed, g ledger.Grant) (string, bool) {
	if err := v.live[g.ID]; errors.Is(err, ErrBarred) {
		return "", false
	} else if err != nil {
		return err.Error(), true
	}
	for _, o := range r.kinds[g.Capability.Kind].Objects(g) {
		if seen, ok := lost[o.ID]; ok {
			reason := "its object in the VM is gone"
			if seen.Detail != "" {
				reason += ": " + seen.Detail
			}
			return reason, true
		}
	}
	return "", false
}

// recordEnds tells whether there was anything to record.
func (r *Reconciler) recordEnds(ctx context.Context, v view, lost map[string]Observed) (bool, error) {
	var ends []ledger.Event
	for _, g := range v.grants {
		if g.State == ledger.Revoking {
			continue
		}
		if reason, ended := r.endReason(v, lost, g); ended {
			ends = append(ends, change(ledger.GrantRevoking, g.ID, reason))
		}
	}
	return len(ends) > 0, r.append(ctx, ends)
}

// share is what one grant has of an object.
type share struct {
	object string
	grant  uuid.UUID
}

// cutShare is a share that was taken away, and in which generation.
type cutShare struct {
	generation uint64
	note       string // what had to be done by force
}

// markCut notes that grants which have ended have nothing of an object any more.
func (r *Reconciler) markCut(a Action, note string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	cut := r.cut[a.Object.VM]
	if cut == nil {
		cut = map[share]cutShare{}
		r.cut[a.Object.VM] = cut
	}
	for _, g := range a.Ended {
		key := share{a.Object.ID, g}
		if done, ok := cut[key]; !ok || done.generation <= a.generation {
			cut[key] = cutShare{a.generation, note}
		}
	}
}

// parted notes what the world says of shared objects: that they are there, and
// not for grants that have ended.
func (r *Reconciler) parted(v view) {
	if len(v.ending) == 0 {
		return
	}
	seen, desired := v.seen(), byID(v.desired)
	for _, e := range v.ending {
		o := seen[e.ID]
		d, shared := desired[e.ID]
		if shared && o.Presence == Present && o.Owners != nil && o.Generation >= v.desired[d].Generation && !sharesAny(o.Owners, e.Owners) {
			r.markCut(Action{Object: e, Ended: e.Owners, generation: e.Generation}, "")
		}
	}
}

// isCut tells whether what an action takes away is known to be gone.
func (r *Reconciler) isCut(a Action) bool {
	if len(a.Ended) == 0 {
		return false
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	return !slices.ContainsFunc(a.Ended, func(g uuid.UUID) bool {
		done, ok := r.cut[a.Object.VM][share{a.Object.ID, g}]
		return !ok || done.generation < a.generation
	})
}

// hasNothing tells whether a grant that has ended was cut off from all of its
// objects, and what took force. An object is cut when it was withdrawn in the
// generation that the grant's end gave it, so that nothing can make it again, or,
// of one that others own too, when it was applied for these alone.
func (r *Reconciler) hasNothing(g ledger.Grant) (force string, cut bool) {
	objects := r.ObjectsOf(g)
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, o := range objects {
		done, ok := r.cut[o.VM][share{o.ID, g.ID}]
		if !ok || done.generation < o.Generation {
			return "", false
		}
		if force == "" {
			force = done.note
		}
	}
	return force, true
}

// recordAllGone moves the grants of a corner all of whose objects are cut to
// revoked, and says where that took force.
func (r *Reconciler) recordAllGone(ctx context.Context, c corner) error {
	var ending []ledger.Grant
	r.o.Ledger.View(func(s *ledger.State) { ending = r.held(s, c, ledger.Revoking) })
	var events []ledger.Event
	for _, g := range ending {
		force, cut := r.hasNothing(g)
		if !cut {
			continue
		}
		if g.Troubled != "" {
			events = append(events, change(ledger.GrantRecovered, g.ID, ""))
		}
		if force != "" && g.Degraded == "" {
			events = append(events, change(ledger.GrantDegraded, g.ID, force))
		}
		events = append(events, change(ledger.GrantRevoked, g.ID, ""))
	}
	if err := r.append(ctx, events); err != nil {
		return err
	}
	r.forgetCut(c)
	return nil
}

// forgetCut drops what was noted of grants whose end is on record.
func (r *Reconciler) forgetCut(c corner) {
	var noted []share
	r.mu.Lock()
	for key := range r.cut[c.vm] {
		noted = append(noted, key)
	}
	r.mu.Unlock()
	// Never the ledger with r.mu held: whoever looks at the ledger takes r.mu.
	r.o.Ledger.View(func(s *ledger.State) {
		noted = slices.DeleteFunc(noted, func(key share) bool {
			g, _ := s.Grant(key.grant)
			return !g.State.Final()
		})
	})
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, key := range noted {
		delete(r.cut[c.vm], key)
	}
	if len(r.cut[c.vm]) == 0 {
		delete(r.cut, c.vm)
	}
}
