package broker

import (
	"context"
	"errors"
	"time"

	"github.com/google/uuid"

	"spectrum-os.org/broker/broker/api"
	"spectrum-os.org/broker/broker/ledger"
	"spectrum-os.org/broker/policy"
)

// refusalStep is the grid on which a delegation is refused: a VM that does not
// exist, one that the guest may not know of, and one for which policy had to be
// asked are refused after as long, unless policy takes longer than a step.
const refusalStep = 250 * time.Millisecond

// introduced tells whether a VM may know of another one, and so delegate to it:
// the VM that a delegation came from, while what was delegated is in force.
func introduced(s *ledger.State, vm, to uuid.UUID, inForce func(uuid.UUID) error) bool {
	for _, g := range s.Grants(ledger.Filter{Holder: vm, States: liveStates}) {
		if g.Parent == uuid.Nil || inForce(g.ID) != nil {
			continue
		}
		if parent, ok := s.Grant(g.Parent); ok && parent.Holder != vm && parent.Holder == to {
			return true
		}
	}
	return false
}

// Delegate implements api.GuestService.
//
// What the guest got wrong about its own grant it is told. Whatever else may be
// in the way, from a VM that does not exist to one whose label is taken, it is
// told in the same words and after the same time.
func (s guestService) Delegate(ctx context.Context, vm uuid.UUID, req api.GuestDelegation) (api.GuestGrant, error) {
	b := s.b
	began := time.Now()
	if !b.ready.Load() {
		return api.GuestGrant{}, api.Errorf(api.CodeUnavailable, "the broker is starting; try again")
	}
	if err := b.ledger.Poisoned(); err != nil {
		return api.GuestGrant{}, guestError(unrecorded("nothing is granted", err))
	}
	r, err := s.delegation(ctx, vm, req)
	if err != nil {
		return api.GuestGrant{}, err
	}
	if err := s.mayRecord(ctx, vm); err != nil {
		return api.GuestGrant{}, err
	}
	g, err := s.delegate(ctx, r)
	if err == nil {
		return b.delegatedGrant(g), nil
	}
	onGrid(ctx, began, refusalStep)
	return api.GuestGrant{}, refusedToGuest(err)
}

// delegation resolves a guest's request, and checks it against the guest's own
// grant. Nothing here depends on the VM that it is for.
func (s guestService) delegation(ctx context.Context, vm uuid.UUID, req api.GuestDelegation) (request, error) {
	b := s.b
	to, err := uuid.Parse(req.To)
	if err != nil {
		return request{}, api.Errorf(api.CodeInvalid, "to is not a UUID")
	}
	if to == vm {
		return request{}, api.Errorf(api.CodeInvalid, "a VM does not delegate to itself: a narrower grant of its own is made by POST /v1/requests with parent")
	}
	var parent ledger.Grant
	if req.Token != "" {
		if parent, err = s.ownToken(ctx, vm, req.Token); err != nil {
			return request{}, err
		}
	} else {
		id, err := uuid.Parse(req.Grant)
		if err != nil {
			return request{}, api.Errorf(api.CodeInvalid, "grant is not a UUID")
		}
		if parent, err = s.ownGrant(ctx, vm, id); err != nil {
			return request{}, err
		}
	}
	r := request{
		action: policy.ActionDelegate, actor: ledger.Actor{Kind: ledger.ActorVM, VM: vm}, holder: to, capability: parent.Capability,
		ttl: req.TTLSeconds, label: req.Label, narrower: true, parent: &parent,
		limits: ledger.Limits{MaxDepth: req.MaxDepth, MaxUses: req.MaxUses},
	}
	if req.Capability != "" {
		var partition uuid.UUID
		b.ledger.View(func(st *ledger.State) { partition, _ = st.Binding(vm) })
		r.capability, err = b.kinds.Parse(req.Capability, selfResolver{partition})
		if e, ok := asAPI(err); ok && e.Code == api.CodeNotFound {
			return request{}, api.Errorf(api.CodeInvalid, "%s is not covered by %s", req.Capability, parent.Capability)
		} else if err != nil {
			return request{}, api.Errorf(api.CodeInvalid, "%w", err)
		}
	}
	if err := b.amplifies(r); err != nil {
		if limited := s.mayRecord(ctx, vm); limited != nil {
			return request{}, limited
		}
		return request{}, b.recordDenial(ctx, decided{request: r}, err)
	}
	return r, nil
}

// amplifies is what a guest got wrong about its own grant, in spellings that it
// knows: without petnames.
func (b *Broker) amplifies(r request) error {
	if !b.kinds.Covers(r.parent.Capability, r.capability) {
		return api.Errorf(api.CodeInvalid, "%s is not covered by %s", r.capability, r.parent.Capability)
	}
	if err := b.checkLimits(r); err != nil {
		return err
	}
	if err := b.checkParent(r); err != nil {
		return api.Errorf(api.CodeInvalid, "%s", err.Error())
	}
	return nil
}

// delegate decides and records. What it returns is durable, and not yet in the
// other VM's world: how long that takes is not the guest's to learn.
func (s guestService) delegate(ctx context.Context, r request) (ledger.Grant, error) {
	b := s.b
	var known bool
	b.ledger.View(func(st *ledger.State) {
		known = introduced(st, r.actor.VM, r.holder, func(id uuid.UUID) error { return b.reconciler.Live(st, id) })
	})
	if !known {
		return ledger.Grant{}, b.recordDenial(ctx, decided{request: r}, api.Errorf(api.CodeDenied,
			"VM %s was not introduced to VM %s: it may delegate to those that delegated to it", r.actor.VM, r.holder))
	}
	return b.grant(ctx, r)
}

// ownGrant is a grant of the VM's own that may be derived from. Any other is
// refused in the same words, and on record as long as the VM has not filled that.
func (s guestService) ownGrant(ctx context.Context, vm, id uuid.UUID) (ledger.Grant, error) {
	var g ledger.Grant
	var usable error
	s.b.ledger.View(func(st *ledger.State) {
		g, _ = st.Grant(id)
		if usable = s.b.reconciler.Live(st, id); usable == nil {
			usable = st.Spent(id)
		}
	})
	if g.Holder == vm && usable == nil {
		return g, nil
	}
	named := id
	if g.Holder != vm {
		named, usable = uuid.Nil, errors.New("the VM holds no grant "+id.String())
	}
	_ = s.refuseToken(ctx, vm, named, usable)
	return ledger.Grant{}, api.Errorf(api.CodeInvalid, "grant %s is none that this VM holds, that is in force and has a use left", id)
}

// Token implements api.GuestService.
func (s guestService) Token(ctx context.Context, vm, id uuid.UUID) (api.Token, error) {
	b := s.b
	var g ledger.Grant
	b.ledger.View(func(st *ledger.State) { g, _ = st.Grant(id) })
	if g.Holder != vm {
		return api.Token{}, api.Errorf(api.CodeNotFound, "the VM holds no capability %s", id)
	}
	if err := s.mayRecord(ctx, vm); err != nil {
		return api.Token{}, err
	}
	return b.issue(ctx, ledger.Actor{Kind: ledger.ActorVM, VM: vm}, g)
}

// delegatedGrant is a grant as the VM sees it that it was delegated by: nothing of
// what becomes of it in the other one.
func (b *Broker) delegatedGrant(g ledger.Grant) api.GuestGrant {
	out := b.guestGrant(g)
	out.Label, out.MountPath, out.From, out.Uses = "", "", nil, nil
	switch out.State {
	case api.GrantActive:
		out.State = api.GrantPending
	case api.GrantRevoked, api.GrantFailed:
		out.State = api.GrantRevoking
	}
	return out
}

// onGrid returns after a whole number of steps since began, or when ctx ends.
func onGrid(ctx context.Context, began time.Time, step time.Duration) {
	timer := time.NewTimer(step - time.Since(began)%step)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-ctx.Done():
	}
}
