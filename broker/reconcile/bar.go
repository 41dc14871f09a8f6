package reconcile

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/google/uuid"

	"spectrum-os.org/broker/broker/ledger"
)

// ErrBarred says that a grant was taken back, or derives from one that was, and
// that the ledger could not be told yet. Whoever barred it puts it on record.
var ErrBarred = errors.New("it was revoked, which is not on record yet")

// CutNow takes grants, and all that derives from them, out of the world without
// the ledger: from now on they give nothing, whatever the ledger says, until
// [Reconciler.Unbar]. It returns when access is cut, or ctx ends.
func (r *Reconciler) CutNow(ctx context.Context, grants []ledger.Grant) error {
	// What derives from them is barred by its ancestor.
	r.mu.Lock()
	for _, root := range grants {
		r.barred[root.ID] = true
	}
	r.mu.Unlock()
	return r.AwaitCut(ctx, grants)
}

// AwaitCut returns when nothing is left in the world of these grants, which have
// ended, and of what derives from them.
func (r *Reconciler) AwaitCut(ctx context.Context, grants []ledger.Grant) error {
	all := map[uuid.UUID]ledger.Grant{}
	r.o.Ledger.View(func(s *ledger.State) {
		for _, root := range grants {
			for _, id := range s.OpenSubtree(root.ID) {
				if g, ok := s.Grant(id); ok {
					all[id] = g
				}
			}
		}
	})
	for _, g := range all {
		r.Wake(g.Holder)
	}
	const look = 20 * time.Millisecond
	for id, g := range all {
		for !r.IsCut(g) {
			select {
			case <-ctx.Done():
				return fmt.Errorf("grant %s is not cut yet: %w", id, ctx.Err())
			case <-time.After(look):
			}
			r.o.Ledger.View(func(s *ledger.State) {
				if now, ok := s.Grant(id); ok {
					g = now
				}
			})
		}
	}
	return nil
}

// IsCut tells whether nothing of a grant is left in the world.
func (r *Reconciler) IsCut(g ledger.Grant) bool {
	_, cut := r.hasNothing(g)
	return g.State.Final() || cut
}

// Bar has grants give nothing, whatever the ledger says, until Unbar.
func (r *Reconciler) Bar(grants ...uuid.UUID) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, id := range grants {
		r.barred[id] = true
	}
}

// Unbar says that the ends of grants that were barred are on record.
func (r *Reconciler) Unbar(grants ...uuid.UUID) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, id := range grants {
		delete(r.barred, id)
	}
}

// Live is why a grant gives nothing, by the ledger or because it is barred, or
// nil.
func (r *Reconciler) Live(s *ledger.State, id uuid.UUID) error {
	if err := s.Live(id, r.o.Clock.Now()); err != nil {
		return err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	for len(r.barred) > 0 && id != uuid.Nil {
		if r.barred[id] {
			return ErrBarred
		}
		g, _ := s.Grant(id)
		id = g.Parent
	}
	return nil
}
