package reconcile

import (
	"context"
	"errors"
	"fmt"

	"github.com/google/uuid"

	"spectrum-os.org/broker/broker/ledger"
	"spectrum-os.org/broker/failpoint"
)

// ErrUsedUp is why a grant failed for which no use was left.
var ErrUsedUp = errors.New("no use of it is left")

// charge puts one use of each owner of an object on record, before the object is
// made in a run of its VM: who crashes in between has spent the use, and gets no
// second one for it. An owner without a use left ends. It is false where none
// remains that may have the object.
func (r *Reconciler) charge(ctx context.Context, o Object) (bool, error) {
	counted := false
	r.o.Ledger.View(func(s *ledger.State) {
		for _, id := range o.Owners {
			g, _ := s.Grant(id)
			counted = counted || g.Limits.MaxUses != nil && !s.Charged(id, o.Instance)
		}
	})
	if !counted {
		return true, nil
	}
	failpoint.Hit("charge.before")
	var left int
	events, err := r.o.Ledger.Update(ctx, func(tx *ledger.Tx) error {
		left = 0
		for _, id := range o.Owners {
			ok, err := r.chargeOne(tx, id, o.Instance)
			if err != nil {
				return err
			}
			if ok {
				left++
			}
		}
		return nil
	})
	if err != nil {
		return false, fmt.Errorf("cannot record a use of %s: %w", o.ID, err)
	}
	failpoint.Hit("charge.recorded")
	for _, e := range events {
		if e.Type == ledger.GrantFailed || e.Type == ledger.GrantRevoking {
			r.remember(e.Grant, ErrUsedUp)
		}
	}
	r.WakeHeirs(events)
	return left > 0, nil
}

// chargeOne tells whether a grant may be used in that run.
func (r *Reconciler) chargeOne(tx *ledger.Tx, id uuid.UUID, run string) (bool, error) {
	s := tx.State()
	g, _ := s.Grant(id)
	if r.Live(s, id) != nil {
		return false, nil
	}
	if g.Limits.MaxUses == nil || s.Charged(id, run) {
		return true, nil
	}
	spent := s.Spent(id)
	if spent == nil {
		return true, tx.Append(ledger.NewUse(ledger.Actor{Kind: ledger.ActorBroker}, id, run))
	}
	end := ledger.GrantRevoking
	if g.State == ledger.Pending {
		end = ledger.GrantFailed
	}
	return false, tx.Append(change(end, id, fmt.Sprintf("%v: %v", ErrUsedUp, spent)))
}

// WakeHeirs wakes the VMs that hold what ended by these events, or derives from
// it: it is dead already, and to be taken from them.
func (r *Reconciler) WakeHeirs(events []ledger.Event) {
	var ended []uuid.UUID
	for _, e := range events {
		switch e.Type {
		case ledger.GrantRevoking, ledger.GrantFailed:
			ended = append(ended, e.Grant)
		}
	}
	if len(ended) == 0 {
		return
	}
	var heirs []uuid.UUID
	r.o.Ledger.View(func(s *ledger.State) { heirs = s.Heirs(ended...) })
	for _, vm := range heirs {
		r.Wake(vm)
	}
}
