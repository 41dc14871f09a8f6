package reconcile

import (
	"context"
	"errors"
	"fmt"
	"time"

	"spectrum-os.org/broker/broker/ledger"
)

// ErrTooLate says that an object had ended, or was about to, when its deadline
// was to be moved.
var ErrTooLate = errors.New("it had ended by then")

// Extender is an [Applier] whose objects can be given a later deadline while
// they are in use. An object of any other is applied again.
type Extender interface {
	// Extend gives an object that is there its deadline and its generation. It
	// refuses an older generation, fails with [ErrTooLate] where the object
	// has ended, and never makes one.
	Extend(ctx context.Context, o Object) error
}

// extendAll moves the deadlines that a plan says, and waits for none: neither a
// revocation nor an application holds up a renewal, nor it them.
func (r *Reconciler) extendAll(plan []Action) {
	for _, a := range plan {
		if a.Verb != Extend {
			continue
		}
		r.mu.Lock()
		busy := r.extending[a.Object.ID] >= a.Object.Generation
		if !busy {
			r.extending[a.Object.ID] = a.Object.Generation
		}
		r.mu.Unlock()
		if busy {
			continue
		}
		r.wg.Go(func() {
			again := r.extend(a)
			r.mu.Lock()
			if r.extending[a.Object.ID] == a.Object.Generation {
				delete(r.extending, a.Object.ID)
			}
			r.mu.Unlock()
			if again {
				r.Wake(a.Object.VM)
			}
		})
	}
}

// longestExtendPause bounds, but for its jitter, the pause after an extension that
// failed: the lease that is renewed would end meanwhile.
const longestExtendPause = 700 * time.Millisecond

// extend tries once, and tells whether the VM is to be looked at again.
func (r *Reconciler) extend(a Action) (again bool) {
	ctx, cancel := context.WithTimeout(r.ctx, r.o.WithdrawTimeout)
	defer cancel()
	var err error
	if extender, ok := r.appliers[a.Object.Kind].(Extender); ok {
		err = extender.Extend(ctx, a.Object)
	} else {
		_, err = r.appliers[a.Object.Kind].Apply(ctx, a.Object)
	}
	log := r.o.Log.With("object", a.Object.ID, "vm", a.Object.VM, "why", a.Why)
	switch {
	case err == nil:
		log.Info("extended")
		if _, troubled := r.TroubleOf(a.Object.ID); troubled {
			r.mend(a.Object.ID)
			if err := r.append(r.ctx, r.recovered(a.Object.Owners)); err != nil {
				log.Warn("cannot record that a renewal works again", "err", err)
			}
		}
	case r.ctx.Err() != nil || errors.Is(err, ErrNotNow):
	case errors.Is(err, ErrTooLate):
		log.Warn("a renewal came too late", "err", err)
		var ends []ledger.Event
		for _, g := range a.Object.Owners {
			ends = append(ends, change(ledger.GrantRevoking, g, fmt.Sprintf("its lease was renewed, but not in time for its VM: %v", err)))
		}
		if err := r.append(r.ctx, ends); err != nil {
			log.Error("cannot record that a renewal came too late", "err", err)
		}
		return true
	default:
		pause := r.fail(r.ctx, a, a.Object.Instance, err, longestExtendPause)
		select {
		case <-r.ctx.Done():
		case <-time.After(pause):
		}
		return true
	}
	return false
}
