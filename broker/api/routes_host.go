package api

import (
	"net/http"
	"time"
)

// eventParams are those of the routes that select events.
var eventParams = []string{"after", "vm", "grant", "type", "since", "until", "actor", "decision", "limit"}

// table is every route of the host API.
func (h *HostHandler) table() []route {
	const get, post, put, del = http.MethodGet, http.MethodPost, http.MethodPut, http.MethodDelete
	return []route{
		{method: get, path: "/v1/health", rule: RuleAnyone, handle: h.health},
		{method: get, path: "/v1/metrics", rule: RulePerson, handle: h.metrics},

		{method: get, path: "/v1/vms", rule: RulePerson, handle: h.listVMs},
		{method: get, path: "/v1/vms/{ref}", rule: RulePerson, handle: h.showVM},
		{method: post, path: "/v1/vms/{ref}/start", rule: RulePersonRecorded, handle: h.startVM},
		{method: post, path: "/v1/vms/{ref}/stop", rule: RulePersonRecorded, body: optionalBody, handle: h.stopVM},
		{method: get, path: "/v1/vms/{ref}/console", rule: RulePersonRecorded, handle: h.console},

		{method: post, path: "/v1/grants", rule: RulePersonRecorded, body: needBody, handle: h.grant},
		{method: get, path: "/v1/grants", rule: RulePerson, query: []string{"vm", "resource", "partition", "state", "all"}, handle: h.listGrants},
		{method: get, path: "/v1/grants/{ref}", rule: RulePerson, handle: h.showGrant},
		{method: post, path: "/v1/grants/{ref}/renew", rule: RulePersonRecorded, body: optionalBody, handle: h.renew},
		{method: get, path: "/v1/grants/{ref}/why", rule: RulePerson, handle: h.why},
		{method: post, path: "/v1/grants/{ref}/token", rule: RulePersonRecorded, handle: h.token},
		{method: post, path: "/v1/revocations", rule: RulePersonRecorded, body: needBody, handle: h.revoke},
		{method: post, path: "/v1/decisions", rule: RulePersonRecorded, body: needBody, handle: h.explain},

		{method: get, path: "/v1/keys", rule: RulePerson, handle: h.listKeys},
		{method: post, path: "/v1/keys/rotate", rule: RulePersonRecorded, handle: h.rotateKeys},
		{method: post, path: "/v1/keys/{kid}/revoke", rule: RulePersonRecorded, body: optionalBody, handle: h.revokeKey},

		{method: post, path: "/v1/policy/reload", rule: RulePersonRecorded, handle: h.reloadPolicy},
		{method: get, path: "/v1/policy/status", rule: RulePerson, handle: h.policyStatus},

		{method: get, path: "/v1/names", rule: RulePerson, handle: h.listNames},
		{method: put, path: "/v1/names/{name}", rule: RulePersonRecorded, body: needBody, handle: h.setName},
		{method: del, path: "/v1/names/{name}", rule: RulePersonRecorded, handle: h.removeName},
		{method: get, path: "/v1/partitions", rule: RulePerson, handle: h.listPartitions},

		{method: get, path: "/v1/plan", rule: RulePerson, query: []string{"vm"}, handle: h.plan},

		{method: get, path: "/v1/events", rule: RulePerson, query: append([]string{"follow"}, eventParams...), handle: h.events},
		{method: get, path: "/v1/audit", rule: RulePerson, query: append([]string{"records"}, eventParams...), handle: h.audit},
		{method: get, path: "/v1/audit/verify", rule: RulePerson, query: []string{"anchor", "from_anchor"}, handle: h.verifyAudit},
		{method: post, path: "/v1/audit/rotate", rule: RulePersonRecorded, handle: h.rotateAudit},
	}
}

func (h *HostHandler) health(x *exchange) (reply, error) {
	return ok(h.svc.Health(x.r.Context()))
}

func (h *HostHandler) metrics(x *exchange) (reply, error) {
	if h.o.Metrics == nil {
		return reply{}, &Error{Code: CodeUnavailable, Detail: "this broker keeps no metrics"}
	}
	return reply{stream: func(w http.ResponseWriter) error {
		// Uncompressed: the reader is on this machine.
		x.r.Header.Del("Accept-Encoding")
		_ = http.NewResponseController(w).SetWriteDeadline(time.Now().Add(h.o.SlowReader))
		h.o.Metrics.ServeHTTP(w, x.r)
		return nil
	}}, nil
}

func (h *HostHandler) listVMs(x *exchange) (reply, error) {
	vms, err := h.svc.ListVMs(x.r.Context())
	return okUnless(VMList{VMs: present(vms)}, err)
}

func (h *HostHandler) showVM(x *exchange) (reply, error) {
	return okUnless(h.svc.ShowVM(x.r.Context(), x.params["ref"]))
}

func (h *HostHandler) startVM(x *exchange) (reply, error) {
	return okUnless(h.svc.StartVM(x.r.Context(), x.caller, x.params["ref"]))
}

func (h *HostHandler) stopVM(x *exchange) (reply, error) {
	req, err := decodeOptional[StopRequest](x.body)
	if err != nil {
		return reply{}, err
	}
	return okUnless(h.svc.StopVM(x.r.Context(), x.caller, x.params["ref"], req))
}

func (h *HostHandler) grant(x *exchange) (reply, error) {
	req, err := decode[GrantRequest](x.body)
	if err != nil {
		return reply{}, err
	}
	g, err := h.svc.Grant(x.r.Context(), x.caller, req)
	if err != nil {
		return reply{}, err
	}
	return reply{status: http.StatusCreated, body: g, location: "/v1/grants/" + g.ID.String()}, nil
}

func (h *HostHandler) listGrants(x *exchange) (reply, error) {
	f, err := grantFilter(x.query)
	if err != nil {
		return reply{}, err
	}
	grants, err := h.svc.ListGrants(x.r.Context(), f)
	return okUnless(GrantList{Grants: present(grants)}, err)
}

func (h *HostHandler) showGrant(x *exchange) (reply, error) {
	return okUnless(h.svc.ShowGrant(x.r.Context(), x.params["ref"]))
}

func (h *HostHandler) why(x *exchange) (reply, error) {
	return okUnless(h.svc.Why(x.r.Context(), x.params["ref"]))
}

func (h *HostHandler) token(x *exchange) (reply, error) {
	return okUnless(h.svc.Token(x.r.Context(), x.caller, x.params["ref"]))
}

func (h *HostHandler) revoke(x *exchange) (reply, error) {
	req, err := decode[RevokeRequest](x.body)
	if err != nil {
		return reply{}, err
	}
	res, err := h.svc.Revoke(x.r.Context(), x.caller, req)
	if err != nil {
		return reply{}, err
	}
	res.Revoked, res.Revoking = present(res.Revoked), present(res.Revoking)
	status := http.StatusOK
	if len(res.Revoking) > 0 {
		status = http.StatusAccepted
	}
	return reply{status: status, body: res}, nil
}

func (h *HostHandler) explain(x *exchange) (reply, error) {
	req, err := decode[GrantRequest](x.body)
	if err != nil {
		return reply{}, err
	}
	return okUnless(h.svc.Explain(x.r.Context(), x.caller, req))
}

func (h *HostHandler) reloadPolicy(x *exchange) (reply, error) {
	st, err := h.svc.ReloadPolicy(x.r.Context(), x.caller)
	st.Engines = present(st.Engines)
	return okUnless(st, err)
}

func (h *HostHandler) policyStatus(x *exchange) (reply, error) {
	st, err := h.svc.PolicyStatus(x.r.Context())
	st.Engines = present(st.Engines)
	return okUnless(st, err)
}

func (h *HostHandler) listNames(x *exchange) (reply, error) {
	names, err := h.svc.ListNames(x.r.Context())
	return okUnless(NameList{Names: present(names)}, err)
}

func (h *HostHandler) setName(x *exchange) (reply, error) {
	name := x.params["name"]
	if err := checkLabel("the name", name); err != nil {
		return reply{}, &Error{Code: CodeInvalid, Detail: err.Error()}
	}
	req, err := decode[SetNameRequest](x.body)
	if err != nil {
		return reply{}, err
	}
	return okUnless(h.svc.SetName(x.r.Context(), x.caller, name, req.Partition))
}

func (h *HostHandler) removeName(x *exchange) (reply, error) {
	if err := h.svc.RemoveName(x.r.Context(), x.caller, x.params["name"]); err != nil {
		return reply{}, err
	}
	return reply{status: http.StatusNoContent}, nil
}

func (h *HostHandler) listPartitions(x *exchange) (reply, error) {
	parts, err := h.svc.ListPartitions(x.r.Context())
	return okUnless(PartitionList{Partitions: present(parts)}, err)
}

func (h *HostHandler) verifyAudit(x *exchange) (reply, error) {
	q, err := verifyQuery(x.query)
	if err != nil {
		return reply{}, err
	}
	return okUnless(h.svc.VerifyAudit(x.r.Context(), q))
}

func (h *HostHandler) rotateAudit(x *exchange) (reply, error) {
	return okUnless(h.svc.RotateAudit(x.r.Context(), x.caller))
}

func okUnless[T any](body T, err error) (reply, error) {
	if err != nil {
		return reply{}, err
	}
	return ok(body)
}

// present makes an empty list of a missing one, which JSON would call null.
func present[T any](list []T) []T {
	if list == nil {
		return []T{}
	}
	return list
}
