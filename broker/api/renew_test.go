package api_test

import (
	"strings"
	"testing"
	"time"

	"spectrum-os.org/broker/broker/api"
)

func TestRenew(t *testing.T) {
	h := serveHost(t, api.HostOptions{})
	ctx, c := t.Context(), h.client
	g := must[api.Grant](t)(c.Grant(ctx, api.GrantRequest{VM: "work/mail", Capability: "fs:ro:work:/docs"}))
	ttl := int64(90)
	got := must[api.Grant](t)(c.Renew(ctx, g.ID.String()[:8], api.RenewRequest{TTLSeconds: &ttl, AcceptNarrower: true, Wait: true, TimeoutSeconds: 2}))
	if got.ID != g.ID || got.Expires == nil || !got.Expires.Equal(epoch.Add(90*time.Second)) || got.Renewed == nil || !got.Renewed.Equal(epoch) {
		t.Errorf("renewed %+v", got)
	}
	// Everything has a default.
	if got := must[api.Grant](t)(c.Renew(ctx, g.ID.String(), api.RenewRequest{})); !got.Expires.Equal(epoch) {
		t.Errorf("renewed %+v", got)
	}
	for _, bad := range []struct {
		r    api.RenewRequest
		says string
	}{
		{api.RenewRequest{TTLSeconds: new(int64)}, "ttl_seconds must be between"},
		{api.RenewRequest{TimeoutSeconds: -1}, "timeout_seconds must be between"},
	} {
		_, err := c.Renew(ctx, g.ID.String(), bad.r)
		if e := coded(t, err, api.CodeInvalid, bad.says); !strings.Contains(e.Detail, bad.says) {
			t.Errorf("%+v: %v", bad.r, err)
		}
	}
	_, err := c.Renew(ctx, "11111111", api.RenewRequest{})
	wantCode(t, err, api.CodeNotFound)
}
