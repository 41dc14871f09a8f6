package broker

import (
	"context"

	"github.com/google/uuid"

	"spectrum-os.org/broker/broker/api"
	"spectrum-os.org/broker/broker/ledger"
	"spectrum-os.org/broker/policy"
)

// fromPerson resolves a person's request. Without a capability it is for all of
// what the parent gives.
func (b *Broker) fromPerson(by api.Caller, req api.GrantRequest) (request, error) {
	holder, err := b.resolveVM(req.VM)
	if err != nil {
		return request{}, err
	}
	r := request{
		action: policy.ActionGrant, actor: actorOf(by), holder: holder, ttl: req.TTLSeconds,
		label: req.Label, persist: req.Persist, narrower: req.AcceptNarrower,
		limits: ledger.Limits{MaxDepth: req.MaxDepth, MaxUses: req.MaxUses},
	}
	if req.Parent != "" {
		parent, err := b.resolveGrant(req.Parent)
		if err != nil {
			return request{}, err
		}
		r.parent = &parent
	}
	if req.Capability == "" && r.parent != nil {
		r.capability = r.parent.Capability
		return r, nil
	}
	r.capability, err = b.kinds.Parse(req.Capability, resolver{b})
	if err != nil {
		return request{}, invalid(err)
	}
	return r, nil
}

// invalid keeps an API error as it is and makes any other one the caller's.
func invalid(err error) error {
	if e, ok := asAPI(err); ok {
		return e
	}
	return api.Errorf(api.CodeInvalid, "%w", err)
}

// Revoke implements api.Service.
func (b *Broker) Revoke(ctx context.Context, by api.Caller, req api.RevokeRequest) (api.RevokeResult, error) {
	pick, err := b.toRevoke(req)
	if err != nil {
		return api.RevokeResult{}, err
	}
	if req.DryRun {
		return b.wouldRevoke(ctx, pick), nil
	}
	reason := req.Reason
	if reason == "" {
		reason = "revoked by a person"
	}
	wait, cancel := b.bounded(ctx, req.TimeoutSeconds, defaultRevokeWait)
	defer cancel()
	done, err := b.revoke(wait, actorOf(by), pick, reason, req.Wait)
	if err != nil {
		return api.RevokeResult{}, err
	}
	return api.RevokeResult{Revoked: b.apiGrants(ctx, done.revoked), Revoking: b.apiGrants(ctx, done.revoking)}, nil
}

// wouldRevoke are the grants that a revocation would end, in the order of the
// tree: each after what it derives from. Nothing is changed, and nothing recorded.
func (b *Broker) wouldRevoke(ctx context.Context, pick func(*ledger.State) []uuid.UUID) api.RevokeResult {
	var grants []ledger.Grant
	b.ledger.View(func(s *ledger.State) {
		for _, id := range fall(s, topmost(s, pick(s))) {
			if g, ok := s.Grant(id); ok && !g.State.Final() {
				grants = append(grants, g)
			}
		}
	})
	return api.RevokeResult{WouldRevoke: b.apiGrants(ctx, grants), DryRun: true}
}

// toRevoke selects the grants that a request means.
func (b *Broker) toRevoke(req api.RevokeRequest) (func(*ledger.State) []uuid.UUID, error) {
	open := ledger.Filter{States: []ledger.GrantState{ledger.Pending, ledger.Active, ledger.Revoking}}
	ways := 0
	for _, given := range []bool{len(req.IDs) > 0, req.VM != "", req.Resource != "", req.All} {
		if given {
			ways++
		}
	}
	if ways != 1 {
		return nil, api.Errorf(api.CodeInvalid, "say what to revoke in exactly one way: grants, a VM, a resource, or all")
	}
	if len(req.IDs) > 0 {
		var ids []uuid.UUID
		for _, ref := range req.IDs {
			g, err := b.resolveGrant(ref)
			if err != nil {
				return nil, err
			}
			ids = append(ids, g.ID)
		}
		return only(ids...), nil
	}
	if req.VM != "" {
		vm, err := b.resolveVM(req.VM)
		if err != nil {
			return nil, err
		}
		open.Holder = vm
	}
	selected, err := b.onResource(open, req.Resource)
	if err != nil {
		return nil, err
	}
	return func(s *ledger.State) []uuid.UUID {
		var ids []uuid.UUID
		for _, g := range selected(s) {
			ids = append(ids, g.ID)
		}
		return ids
	}, nil
}
