package api

import (
	"net/http"

	"github.com/google/uuid"
)

// table is every route of the guest API. hide is the code that stands for all
// the guest may not tell apart.
func (h *GuestHandler) table() []route {
	const get, post, del = http.MethodGet, http.MethodPost, http.MethodDelete
	return []route{
		{method: get, path: "/v1/self", rule: RuleHolder, hide: CodeNotFound, handle: h.self},
		{method: get, path: "/v1/capabilities", rule: RuleHolder, hide: CodeNotFound, handle: h.capabilities},
		{method: post, path: "/v1/requests", rule: RuleHolder, hide: CodeDenied, body: needBody, handle: h.request},
		{method: post, path: "/v1/delegations", rule: RuleHolder, hide: CodeDenied, body: needBody, handle: h.delegate},
		{method: post, path: "/v1/capabilities/{id}/token", rule: RuleHolder, hide: CodeNotFound, handle: h.token},
		{method: del, path: "/v1/capabilities/{id}", rule: RuleHolder, hide: CodeNotFound, body: optionalBody, handle: h.dropID},
		{method: post, path: "/v1/capabilities/drop", rule: RuleHolder, hide: CodeTokenRefused, body: needBody, handle: h.dropToken},
	}
}

func (h *GuestHandler) self(x *exchange) (reply, error) {
	return okUnless(h.svc.Self(x.r.Context(), h.vm))
}

func (h *GuestHandler) capabilities(x *exchange) (reply, error) {
	grants, err := h.svc.Capabilities(x.r.Context(), h.vm)
	return okUnless(GuestGrantList{Capabilities: present(grants)}, err)
}

func (h *GuestHandler) request(x *exchange) (reply, error) {
	req, err := decode[GuestRequest](x.body)
	if err != nil {
		return reply{}, err
	}
	g, err := h.svc.Request(x.r.Context(), h.vm, req)
	if err != nil {
		return reply{}, err
	}
	return reply{status: http.StatusCreated, body: GuestGranted{Grant: g, Token: g.Token}}, nil
}

func (h *GuestHandler) delegate(x *exchange) (reply, error) {
	req, err := decode[GuestDelegation](x.body)
	if err != nil {
		return reply{}, err
	}
	g, err := h.svc.Delegate(x.r.Context(), h.vm, req)
	if err != nil {
		return reply{}, err
	}
	return reply{status: http.StatusCreated, body: g}, nil
}

func (h *GuestHandler) token(x *exchange) (reply, error) {
	id, err := grantID(x)
	if err != nil {
		return reply{}, err
	}
	return okUnless(h.svc.Token(x.r.Context(), h.vm, id))
}

// grantID is the id in a path, in its canonical form.
func grantID(x *exchange) (uuid.UUID, error) {
	id, err := uuid.Parse(x.params["id"])
	if err != nil || id.String() != x.params["id"] || id == uuid.Nil {
		return uuid.Nil, &Error{Code: CodeNotFound}
	}
	return id, nil
}

func (h *GuestHandler) dropID(x *exchange) (reply, error) {
	id, err := grantID(x)
	if err != nil {
		return reply{}, err
	}
	req, err := decodeOptional[DropRequest](x.body)
	if err != nil {
		return reply{}, err
	}
	return h.dropped(h.svc.Drop(x.r.Context(), h.vm, id, req.Token))
}

func (h *GuestHandler) dropToken(x *exchange) (reply, error) {
	req, err := decode[DropRequest](x.body)
	if err != nil {
		return reply{}, err
	}
	return h.dropped(h.svc.Drop(x.r.Context(), h.vm, uuid.Nil, req.Token))
}

// dropped answers 202 while access is not yet cut.
func (h *GuestHandler) dropped(g GuestGrant, err error) (reply, error) {
	if err != nil {
		return reply{}, err
	}
	if g.State == GrantRevoking {
		return reply{status: http.StatusAccepted, body: g}, nil
	}
	return ok(g)
}
