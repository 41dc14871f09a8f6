package broker

import (
	"context"
	"encoding/base64"
	"errors"
	"slices"
	"time"

	"github.com/google/uuid"

	"spectrum-os.org/broker/broker/api"
	"spectrum-os.org/broker/broker/ledger"
	"spectrum-os.org/broker/capabilities"
	"spectrum-os.org/broker/policy"
)

// guestService is what a VM may ask for itself. Whatever it may not know is
// refused in the words of refusedToGuest.
type guestService struct{ b *Broker }

var _ api.GuestService = guestService{}

// refusedToGuest does not tell a guest whether policy, a missing path, or a
// missing partition was the reason: each would answer a question about the
// host that it did not have to ask.
func refusedToGuest(cause error) error {
	return api.Errorf(api.CodeDenied, "the request is not allowed").WithCause(cause)
}

// Self implements api.GuestService.
func (s guestService) Self(_ context.Context, vm uuid.UUID) (api.Self, error) {
	u := s.b.unit(vm)
	if u == nil {
		return api.Self{}, api.Errorf(api.CodeUnavailable, "the VM is ending")
	}
	self := api.Self{ID: vm, Role: "app", Instance: u.instance(), Now: s.b.o.Clock.Now().Wall}
	if d, ok := s.b.inv().definitions[vm]; ok {
		self.Role = d.Role
		if !d.BuiltIn() {
			self.Partition = &d.Partition
		}
	}
	return self, nil
}

// Capabilities implements api.GuestService.
func (s guestService) Capabilities(_ context.Context, vm uuid.UUID) ([]api.GuestGrant, error) {
	var grants []ledger.Grant
	s.b.ledger.View(func(st *ledger.State) {
		grants = st.Grants(ledger.Filter{Holder: vm, States: []ledger.GrantState{ledger.Pending, ledger.Active, ledger.Revoking}})
	})
	out := make([]api.GuestGrant, 0, len(grants))
	for _, g := range grants {
		out = append(out, s.b.guestGrant(g))
	}
	return out, nil
}

// Request implements api.GuestService.
func (s guestService) Request(ctx context.Context, vm uuid.UUID, req api.GuestRequest) (api.GuestGrant, error) {
	b := s.b
	if !b.ready.Load() {
		return api.GuestGrant{}, api.Errorf(api.CodeUnavailable, "the broker is starting; try again")
	}
	actor := ledger.Actor{Kind: ledger.ActorVM, VM: vm}
	var partition uuid.UUID
	b.ledger.View(func(st *ledger.State) { partition, _ = st.Binding(vm) })
	c, err := b.kinds.Parse(req.Capability, selfResolver{partition})
	if e, ok := errors.AsType[*api.Error](err); ok && e.Code == api.CodeNotFound {
		return api.GuestGrant{}, refusedToGuest(err)
	}
	if err != nil {
		return api.GuestGrant{}, api.Errorf(api.CodeInvalid, "%w", err)
	}
	r := request{
		action: policy.ActionRequest, actor: actor, holder: vm, capability: c,
		ttl: req.TTLSeconds, label: req.Label, narrower: true,
	}
	if req.Parent != "" {
		parent, err := s.ownToken(ctx, vm, req.Parent)
		if err != nil {
			return api.GuestGrant{}, err
		}
		r.parent = &parent
	}
	if err := s.mayRecord(ctx, vm); err != nil {
		return api.GuestGrant{}, err
	}
	g, err := b.grant(ctx, r)
	if err == nil {
		g, err = b.outcome(ctx, g)
	}
	if err != nil {
		return api.GuestGrant{}, guestError(err)
	}
	out := b.guestGrant(g)
	token, _, err := b.mint(ctx, actor, g)
	if err != nil {
		return api.GuestGrant{}, err
	}
	out.Token = token
	return out, nil
}

// guestError keeps from a guest what only the host may know.
func guestError(err error) error {
	e, ok := errors.AsType[*api.Error](err)
	if !ok {
		return err
	}
	switch e.Code {
	case api.CodeDenied, api.CodePolicyError, api.CodeNotFound:
		return refusedToGuest(err)
	case api.CodeInvalid:
		// A cause is something that was found on the host, such as a path that
		// is not there; without one the request itself is malformed.
		if e.Unwrap() != nil {
			return refusedToGuest(err)
		}
	}
	if e.Code == api.CodeUnavailable && e.Unwrap() != nil {
		// What is wrong with the host's disk is none of its business.
		return api.Errorf(api.CodeUnavailable, "nothing can be recorded just now, so nothing is granted; try again later").WithCause(err)
	}
	out := *e
	out.Verdict, out.Grant, out.Candidates = nil, nil, nil
	return &out
}

// Drop implements api.GuestService.
func (s guestService) Drop(ctx context.Context, vm, id uuid.UUID, token string) (api.GuestGrant, error) {
	b := s.b
	if token != "" {
		g, err := s.ownToken(ctx, vm, token)
		if err != nil {
			return api.GuestGrant{}, err
		}
		if id != uuid.Nil && id != g.ID {
			return api.GuestGrant{}, s.refuseToken(ctx, vm, g.ID, errors.New("the token is another grant's"))
		}
		id = g.ID
	}
	var g ledger.Grant
	var ok, mine bool
	b.ledger.View(func(st *ledger.State) {
		g, ok = st.Grant(id)
		mine = slices.ContainsFunc(st.Lineage(id), func(a ledger.Grant) bool { return a.Holder == vm })
	})
	if !ok || !mine {
		return api.GuestGrant{}, api.Errorf(api.CodeNotFound, "the VM holds no capability %s, nor what it derives from", id)
	}
	reason, view := "dropped by its holder", b.guestGrant
	if g.Holder != vm {
		reason, view = "taken back by VM "+vm.String()+", from whose grant it derives", b.delegatedGrant
	}
	began := time.Now()
	_, err := b.revoke(ctx, ledger.Actor{Kind: ledger.ActorVM, VM: vm}, only(id), reason, false)
	if api.CodeOf(err) == api.CodeUnavailable {
		// What is wrong with the host's disk is none of its business.
		return api.GuestGrant{}, api.Errorf(api.CodeUnavailable, "it is taken back, which cannot be recorded just now").WithCause(err)
	}
	if err != nil {
		return api.GuestGrant{}, err
	}
	// It waits for what it held itself. How long another VM holds on, here or
	// further down, is not this one's to learn.
	g, err = b.await(ctx, id, func(now ledger.Grant) bool { return now.Holder != vm || now.State.Final() })
	if err == nil && g.State.Final() {
		b.metrics.cut(time.Since(began))
	}
	return view(g), nil
}

// ownToken accepts a token that this broker signed for this VM and that is in
// force. Any other is refused in the same words, and on record as long as the VM
// has not filled that.
func (s guestService) ownToken(ctx context.Context, vm uuid.UUID, text string) (ledger.Grant, error) {
	raw, err := base64.RawURLEncoding.Strict().DecodeString(text)
	if err != nil {
		return ledger.Grant{}, s.refuseToken(ctx, vm, uuid.Nil, capabilities.ErrTokenMalformed)
	}
	verified, err := s.b.keys.Verify(raw, s.b.o.Clock.Now().Wall)
	if err != nil {
		return ledger.Grant{}, s.refuseToken(ctx, vm, uuid.Nil, err)
	}
	claims := verified.Claims()
	if err := verified.For(vm); err != nil {
		return ledger.Grant{}, s.refuseToken(ctx, vm, claims.Grant, err)
	}
	var g ledger.Grant
	var live error
	s.b.ledger.View(func(st *ledger.State) {
		g, _ = st.Grant(claims.Grant)
		if live = s.b.keys.Refused(st, verified); live == nil {
			live = s.b.reconciler.Live(st, claims.Grant)
		}
		if live == nil {
			live = st.Spent(claims.Grant)
		}
	})
	if live != nil {
		return ledger.Grant{}, s.refuseToken(ctx, vm, claims.Grant, live)
	}
	return g, nil
}

type refusedData struct {
	Reason string `json:"reason"`
}

func (s guestService) refuseToken(ctx context.Context, vm, grant uuid.UUID, cause error) error {
	refusal := api.Errorf(api.CodeTokenRefused, "the token is not accepted").WithCause(cause)
	if s.mayRecord(ctx, vm) != nil {
		return refusal
	}
	_, err := s.b.ledger.Update(context.WithoutCancel(ctx), func(tx *ledger.Tx) error {
		partition, _ := tx.State().Binding(vm)
		return tx.Append(ledger.Event{
			Type: ledger.TokenRefused, Actor: ledger.Actor{Kind: ledger.ActorVM, VM: vm}, VM: vm,
			Grant: grant, Partition: partition, Data: ledger.JSON(refusedData{cause.Error()}),
		})
	})
	if err != nil {
		s.b.log.Error("cannot record a refused token", "vm", vm, "err", err)
	}
	return refusal
}

// guestGrant is a grant as its holder sees it.
func (b *Broker) guestGrant(g ledger.Grant) api.GuestGrant {
	g = b.shown(g)
	out := api.GuestGrant{
		ID: g.ID, Capability: apiCapability(g.Capability), Spelling: g.Capability.String(), Label: g.Label,
		State: api.GrantState(g.State), Created: g.Created, MountPath: b.reconciler.Place(g),
	}
	if g.Parent != uuid.Nil {
		out.Parent = &g.Parent
		b.ledger.View(func(s *ledger.State) {
			if parent, ok := s.Grant(g.Parent); ok && parent.Holder != g.Holder {
				out.From = &parent.Holder
			}
		})
	}
	out.MaxDepth, out.MaxUses = g.Limits.MaxDepth, g.Limits.MaxUses
	if out.MaxUses != nil {
		out.Uses = &g.Uses
	}
	if !g.Deadline.IsZero() {
		out.Expires = &g.Deadline.Wall
	}
	out.Narrowed = narrowed(g)
	return out
}

// mint signs the token of a grant, and tells with which key.
func (b *Broker) mint(ctx context.Context, actor ledger.Actor, g ledger.Grant) (text, kid string, err error) {
	token, kid, err := b.keys.Mint(context.WithoutCancel(ctx), actor, capabilities.Claims{
		Holder: g.Holder, Grant: g.ID, Parent: g.Parent, IssuedAt: g.Created, Expiry: g.Deadline.Wall,
		Capability: g.Capability,
	})
	if err != nil {
		return "", "", api.Errorf(api.CodeUnavailable, "no token can be signed; see the broker's log").WithCause(err)
	}
	encoded, err := token.MarshalText()
	return string(encoded), kid, err
}
