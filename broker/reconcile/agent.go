package reconcile

import (
	"context"
	"errors"
	"slices"

	"github.com/google/uuid"

	"spectrum-os.org/broker/broker/ledger"
)

// AgentAnswers says that the VM's agent answers; back, that it did not before.
// An agent that is back is asked for all objects, since it may have lost them,
// any other for those that it missed: it may have been replaced unseen.
func (r *Reconciler) AgentAnswers(ctx context.Context, vm uuid.UUID, back bool) {
	r.mu.Lock()
	some := len(r.missed) > 0
	r.mu.Unlock()
	if !back && !some {
		return
	}
	for kind, applier := range r.appliers {
		follower, ok := applier.(AgentFollower)
		if !ok {
			continue
		}
		v, err := r.look(ctx, corner{vm, kind})
		if err != nil {
			r.o.Log.Warn("cannot tell a VM's agent what it missed", "vm", vm, "kind", kind, "err", err)
			continue
		}
		r.tellAgent(ctx, follower, v, back)
	}
}

func (r *Reconciler) tellAgent(ctx context.Context, follower AgentFollower, v view, back bool) {
	seen := v.seen()
	for _, o := range v.desired {
		if seen[o.ID].Presence != Present || !back && !r.hasMissed(o.ID) {
			continue
		}
		err := follower.AgentBack(ctx, o)
		if !errors.Is(err, ErrNotNow) {
			r.agentDid(o.ID, err == nil)
		}
		if err != nil {
			r.o.Log.Warn("cannot tell a VM's agent what it missed", "vm", o.VM, "object", o.ID, "err", err)
		}
	}
}

// agentDid says whether an agent that was asked again took up an object.
func (r *Reconciler) agentDid(object string, took bool) {
	r.setMissed(object, !took)
	r.mu.Lock()
	defer r.mu.Unlock()
	if took {
		r.caughtUp[object] = true
	} else {
		delete(r.caughtUp, object)
	}
}

// Reason is what there is to say of a grant: what is on record, unless that is
// that no agent took it up, and one has since.
func (r *Reconciler) Reason(g ledger.Grant) string {
	if g.State != ledger.Active || g.Reason == "" {
		return g.Reason
	}
	objects := r.ObjectsOf(g)
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(objects) == 0 || slices.ContainsFunc(objects, func(o Object) bool { return !r.caughtUp[o.ID] }) {
		return g.Reason
	}
	return ""
}

// Place is where the VM finds what was granted, or "".
func (r *Reconciler) Place(g ledger.Grant) string {
	g.Reason = r.Reason(g)
	if placer, ok := r.appliers[g.Capability.Kind].(Placer); ok {
		return placer.Place(g)
	}
	return ""
}

func (r *Reconciler) hasMissed(object string) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.missed[object]
}

func (r *Reconciler) setMissed(object string, missed bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if missed {
		r.missed[object] = true
	} else {
		delete(r.missed, object)
	}
}
