package api_test

import (
	"errors"
	"strings"
	"testing"

	"spectrum-os.org/broker/broker/api"
)

func TestEveryOperationIsTried(t *testing.T) {
	h := serveHost(t, api.HostOptions{})
	ctx, c := t.Context(), h.client
	h.emit(3)
	// Every call once with a broker that fails, so that each answers a
	// problem document that says nothing of the cause.
	h.mu.Lock()
	h.fail = errors.New("the cause: /var/lib/secret-path is on fire")
	h.mu.Unlock()
	_, errs := 0, []error{}
	try := func(_ any, err error) { errs = append(errs, err) }
	try(c.ListVMs(ctx))
	try(c.ShowVM(ctx, "x"))
	try(c.StartVM(ctx, "x"))
	try(c.StopVM(ctx, "x", api.StopRequest{}))
	try(c.Console(ctx, "x"))
	try(c.Grant(ctx, api.GrantRequest{VM: "x", Capability: "y"}))
	try(c.ListGrants(ctx, api.GrantFilter{}))
	try(c.ShowGrant(ctx, "x"))
	try(c.Why(ctx, "x"))
	try(c.Token(ctx, "x"))
	try(c.Renew(ctx, "x", api.RenewRequest{}))
	try(c.Revoke(ctx, api.RevokeRequest{VM: "x"}))
	try(c.Explain(ctx, api.GrantRequest{VM: "x", Capability: "y"}))
	tryKeys(ctx, c, try)
	try(c.ReloadPolicy(ctx))
	try(c.PolicyStatus(ctx))
	try(c.ListNames(ctx))
	try(c.SetName(ctx, "x", partition))
	try(nil, c.RemoveName(ctx, "x"))
	try(c.ListPartitions(ctx))
	try(c.Plan(ctx, "x"))
	try(c.Audit(ctx, api.EventQuery{}))
	try(c.VerifyAudit(ctx, api.VerifyQuery{}))
	try(c.RotateAudit(ctx))
	for _, err := range c.Events(ctx, api.EventQuery{}, false) {
		try(nil, err)
	}
	for i, err := range errs {
		e := coded(t, err, api.CodeInternal, "urn:uuid:")
		if strings.Contains(e.Error(), "fire") {
			t.Errorf("call %d tells the cause: %v", i, e)
		}
		id := e.Detail[strings.Index(e.Detail, "urn:uuid:"):]
		if !strings.Contains(h.log.String(), id) {
			t.Errorf("call %d: the log lacks %s", i, id)
		}
	}
	if !strings.Contains(h.log.String(), "on fire") {
		t.Error("the log lacks the cause")
	}
	_, err := c.Metrics(ctx)
	wantCode(t, err, api.CodeUnavailable)
	h.stop()                          // and with it the last check
	want := len(h.handler.Rows()) - 1 // health cannot fail
	failed := 0
	for key := range h.valid.Seen() {
		if strings.HasSuffix(key, " 500") || strings.HasSuffix(key, " 503") {
			failed++
		}
	}
	if failed != want {
		t.Errorf("%d of %d operations were tried: %v", failed, want, h.valid.Seen())
	}
}
