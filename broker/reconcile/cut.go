package reconcile

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"time"

	"github.com/google/uuid"

	"spectrum-os.org/broker/broker/ledger"
	"spectrum-os.org/broker/failpoint"
)

// cutPass records which grants have ended, and orders every withdrawal that is
// not under way yet. It waits for none of them: a later revocation never waits
// for what an earlier one takes from the guest.
func (r *Reconciler) cutPass(ctx context.Context, vm uuid.UUID) error {
	v, err := r.look(ctx, vm)
	if err != nil {
		return err
	}
	// A grant that died of itself (its lease, an ancestor, its device) is
	// recorded as revoking before it is cut, so that the order on record is
	// the order in the world.
	ended, unrecorded := r.recordEnds(ctx, v, lostObjects(v))
	switch {
	case unrecorded != nil:
		// It must be cut even where that cannot be recorded.
		r.o.Log.Error("cannot record that grants ended; cutting access all the same", "vm", vm, "err", unrecorded)
	case ended:
		if v, err = r.look(ctx, vm); err != nil {
			return err
		}
	}
	for _, a := range v.plan {
		if a.Verb != Withdraw {
			continue
		}
		// What was withdrawn already waits only for the ledger.
		there := slices.ContainsFunc(v.observed, func(o Observed) bool { return o.ID == a.Object.ID && o.Presence != Gone })
		if there || !r.isCut([]Object{a.Object}) {
			r.order(a)
		}
	}
	r.extendAll(v.plan)
	return errors.Join(unrecorded, r.recordGone(ctx, vm))
}

// withdrawal is a Withdraw under way.
type withdrawal struct {
	object Object
	cancel context.CancelFunc
	// resting: it failed, and waits before the VM is looked at again.
	resting bool
}

// order begins a withdrawal, unless it is under way. One of a newer generation
// takes the place of an older one.
func (r *Reconciler) order(a Action) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if w := r.withdrawing[a.Object.ID]; w != nil {
		if !w.resting && w.object.Generation >= a.Object.Generation {
			return
		}
		w.cancel()
	}
	ctx, cancel := context.WithCancel(r.ctx)
	w := &withdrawal{object: a.Object, cancel: cancel}
	r.withdrawing[a.Object.ID] = w
	r.wg.Go(func() {
		defer cancel()
		r.withdraw(ctx, w, a)
	})
}

func (r *Reconciler) withdraw(ctx context.Context, w *withdrawal, a Action) {
	id, vm := a.Object.ID, a.Object.VM
	limited, cancel := context.WithTimeout(ctx, r.o.WithdrawTimeout)
	failpoint.Hit("withdraw.before")
	note, err := r.appliers[a.Object.Kind].Withdraw(limited, a.Object)
	failpoint.Hit("withdraw.after")
	cancel()
	if err == nil {
		r.overtake(a.Object)
		r.o.Log.Info("withdrawn", "object", id, "vm", vm, "why", a.Why, "note", note)
		if len(a.Object.Owners) > 0 {
			r.mu.Lock()
			if done, ok := r.cut[id]; !ok || done.generation <= a.Object.Generation {
				r.cut[id] = cutObject{a.Object.Generation, note}
			}
			r.mu.Unlock()
		}
		err = r.recordGone(ctx, vm)
	} else {
		err = fmt.Errorf("cannot %s: %w", a, err)
	}
	if err != nil && ctx.Err() == nil {
		r.rest(ctx, w, err)
	}
	r.mu.Lock()
	current := r.withdrawing[id] == w
	if current {
		delete(r.withdrawing, id)
		if err == nil {
			delete(r.pauses, id)
		}
	}
	r.mu.Unlock()
	if current {
		r.Wake(vm)
	}
}

// rest waits after a failed withdrawal, longer each time. Whoever finds it
// resting may begin another one at once.
func (r *Reconciler) rest(ctx context.Context, w *withdrawal, err error) {
	r.mu.Lock()
	w.resting = true
	pause := max(firstPause, r.pauses[w.object.ID])
	r.pauses[w.object.ID] = min(2*pause, longestPause)
	r.mu.Unlock()
	r.o.Log.Warn("cannot withdraw yet", "object", w.object.ID, "vm", w.object.VM, "err", err, "again_in", pause)
	timer := time.NewTimer(pause + rand.N(pause/2))
	defer timer.Stop()
	select {
	case <-ctx.Done():
	case <-timer.C:
	}
}

// busy tells whether a withdrawal from the VM is under way.
func (r *Reconciler) busy(vm uuid.UUID) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, w := range r.withdrawing {
		if w.object.VM == vm {
			return true
		}
	}
	return false
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
		if g.State == ledger.Revoking || r.kinds[g.Capability.Kind] == nil {
			continue
		}
		if reason, ended := r.endReason(v, lost, g); ended {
			ends = append(ends, change(ledger.GrantRevoking, g.ID, reason))
		}
	}
	return len(ends) > 0, r.append(ctx, ends)
}

// cutObject is an object that was withdrawn, and in which generation.
type cutObject struct {
	generation uint64
	note       string // what had to be done by force
}

// recordGone moves the grants of a VM all of whose objects are cut to revoked,
// and says where that took force. An object is cut when it was withdrawn in the
// generation that the grant's end gave it, so that nothing can make it again.
func (r *Reconciler) recordGone(ctx context.Context, vm uuid.UUID) error {
	var ending []ledger.Grant
	r.o.Ledger.View(func(s *ledger.State) {
		ending = s.Grants(ledger.Filter{Holder: vm, States: []ledger.GrantState{ledger.Revoking}})
	})
	var gone []ledger.Event
	var objects []string
	for _, g := range ending {
		if kind := r.kinds[g.Capability.Kind]; kind != nil && r.isCut(kind.Objects(g)) {
			for _, o := range kind.Objects(g) {
				objects = append(objects, o.ID)
				if note := r.force(o.ID); note != "" && g.Degraded == "" {
					gone = append(gone, change(ledger.GrantDegraded, g.ID, note))
				}
			}
			gone = append(gone, change(ledger.GrantRevoked, g.ID, ""))
		}
	}
	if err := r.append(ctx, gone); err != nil {
		return err
	}
	failpoint.Hit("withdraw.recorded")
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, id := range objects {
		delete(r.cut, id)
	}
	return nil
}

// force is what had to be done to cut an object.
func (r *Reconciler) force(object string) string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.cut[object].note
}

func (r *Reconciler) isCut(objects []Object) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, o := range objects {
		if done, ok := r.cut[o.ID]; !ok || done.generation < o.Generation {
			return false
		}
	}
	return true
}
