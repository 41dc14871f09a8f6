package broker

import (
	"context"
	"errors"
	"time"

	"github.com/google/uuid"

	"spectrum-os.org/broker/broker/api"
	"spectrum-os.org/broker/broker/ledger"
	"spectrum-os.org/broker/failpoint"
	"spectrum-os.org/broker/vmm/shim"
)

// revocation is what became of a revocation: access is cut, or will be and is
// not yet seen to be.
type revocation struct{ revoked, revoking []ledger.Grant }

// revoke ends the grants that pick selects, with all that derives from them.
// They are selected where they are revoked: no grant slips in between. It is
// durable when it returns; with wait it returns when access is cut, or ctx ends,
// which does not keep a revocation from being recorded.
// Where it cannot be recorded, access is cut all the same, and the error says so.
// What with does shares its fate: it is recorded with the revocation or not at all.
//
// One row ends a whole subtree: what derives from a grant that ended is dead at
// once, and its own end is put on record when it is taken from its holder.
func (b *Broker) revoke(ctx context.Context, actor ledger.Actor, pick func(*ledger.State) []uuid.UUID, reason string, wait bool, with ...together) (revocation, error) {
	failpoint.Hit("revoke.before")
	began := time.Now()
	var roots, all []uuid.UUID
	_, err := b.ledger.Update(context.WithoutCancel(ctx), func(tx *ledger.Tx) error {
		for _, w := range with {
			if err := w.first(tx); err != nil {
				return err
			}
		}
		s := tx.State()
		roots = topmost(s, pick(s))
		all = fall(s, roots)
		for _, id := range roots {
			err := tx.Append(ledger.NewChange(ledger.GrantRevoking, actor, id, ledger.Change{Reason: reason}))
			// One that has ended already needs no ending.
			if err != nil && !errors.Is(err, ledger.ErrIllegalMove) {
				return err
			}
		}
		return nil
	})
	for _, w := range with {
		w.recorded(err)
	}
	if err != nil {
		return revocation{}, b.cutUnrecorded(actor, pick, reason, err)
	}
	failpoint.Hit("revoke.recorded")
	b.wakeHeirs(roots...)
	var out revocation
	for _, id := range all {
		var g ledger.Grant
		if wait {
			// An expired ctx makes this answer at once with what is true.
			g, _ = b.await(ctx, id, func(g ledger.Grant) bool { return g.State.Final() })
		} else {
			b.ledger.View(func(s *ledger.State) { g, _ = s.Grant(id) })
		}
		if g.State.Final() {
			out.revoked = append(out.revoked, g)
		} else {
			out.revoking = append(out.revoking, g)
		}
	}
	failpoint.Hit("revoke.answer")
	if wait && len(out.revoking) == 0 {
		b.metrics.cut(time.Since(began))
	}
	return out, nil
}

// topmost are those of ids that none of the others is an ancestor of.
func topmost(s *ledger.State, ids []uuid.UUID) []uuid.UUID {
	picked := make(map[uuid.UUID]bool, len(ids))
	for _, id := range ids {
		picked[id] = true
	}
	var out []uuid.UUID
	taken := make(map[uuid.UUID]bool, len(ids))
	for _, id := range ids {
		if !taken[id] && !s.HasAncestorIn(id, picked) {
			taken[id] = true
			out = append(out, id)
		}
	}
	return out
}

// fall are the grants that end with roots: themselves, and of what derives from
// them all that has not ended long ago.
func fall(s *ledger.State, roots []uuid.UUID) []uuid.UUID {
	var all []uuid.UUID
	for _, root := range roots {
		all = append(all, s.OpenSubtree(root)...)
	}
	return all
}

// wakeHeirs has all that derives from these grants, and they themselves, looked
// at by those who hold it.
func (b *Broker) wakeHeirs(ids ...uuid.UUID) {
	var heirs []uuid.UUID
	b.ledger.View(func(s *ledger.State) { heirs = s.Heirs(ids...) })
	for _, vm := range heirs {
		b.reconciler.Wake(vm)
	}
}

// together is what is recorded in one step with a revocation: first appends it,
// and recorded is told whether that succeeded, before anybody waits for a cut.
type together struct {
	first    func(*ledger.Tx) error
	recorded func(err error)
}

// only selects these grants.
func only(ids ...uuid.UUID) func(*ledger.State) []uuid.UUID {
	return func(*ledger.State) []uuid.UUID { return ids }
}

// applyError is the API's error for a grant that could not be applied.
func applyError(cause error, g ledger.Grant) *api.Error {
	if refused, ok := errors.AsType[*shim.Error](cause); ok && refused.Code == shim.CodeNoSlots {
		return api.Errorf(api.CodeNoSlots, "grant %s failed: %s", g.ID, refused.Message)
	}
	switch g.State {
	case ledger.Revoking, ledger.Revoked:
		return api.Errorf(api.CodeConflict, "grant %s was revoked before it was applied: %s", g.ID, g.Reason)
	default:
		return api.Errorf(api.CodeConflict, "grant %s failed: %s", g.ID, g.Reason)
	}
}
