package api_test

import (
	"context"
	"strings"
	"testing"
	"time"

	"spectrum-os.org/broker/broker/api"
)

// The fake has one key, and one that it knows of as retired.
func fakeKeys() []api.Key {
	retired := epoch.Add(time.Hour)
	return []api.Key{
		{KID: "0011223344556677", State: api.KeyRetired, Epoch: 1, Created: epoch, Retired: &retired, Grants: 2},
		{KID: "8899aabbccddeeff", State: api.KeyCurrent, Epoch: 1, Created: retired},
	}
}

func (f *fake) ListKeys(context.Context) ([]api.Key, error) {
	err := f.enter("ListKeys")
	defer f.mu.Unlock()
	return fakeKeys(), err
}

func (f *fake) RotateKeys(_ context.Context, by api.Caller) (api.Key, error) {
	err := f.enter("RotateKeys", by)
	defer f.mu.Unlock()
	return fakeKeys()[1], err
}

func (f *fake) RevokeKey(_ context.Context, by api.Caller, ref string, r api.RevokeKeyRequest) (api.RevokeKeyResult, error) {
	err := f.enter("RevokeKey", by)
	defer f.mu.Unlock()
	f.refs = append(f.refs, ref)
	f.last = api.RevokeRequest{Reason: r.Reason, Wait: r.Wait, TimeoutSeconds: r.TimeoutSeconds}
	if err != nil {
		return api.RevokeKeyResult{}, err
	}
	out := api.RevokeKeyResult{Key: fakeKeys()[0], Current: fakeKeys()[1]}
	out.Key.State, out.Key.Revoked, out.Key.Reason = api.KeyRevoked, &epoch, r.Reason
	for _, g := range f.grants {
		if !f.cut {
			g.State = api.GrantRevoking
			out.Revoking = append(out.Revoking, g)
		} else {
			g.State = api.GrantRevoked
			out.Revoked = append(out.Revoked, g)
		}
	}
	return out, nil
}

func tryKeys(ctx context.Context, c *api.Client, try func(any, error)) {
	try(c.ListKeys(ctx))
	try(c.RotateKeys(ctx))
	try(c.RevokeKey(ctx, "x", api.RevokeKeyRequest{}))
}

func TestKeys(t *testing.T) {
	h := serveHost(t, api.HostOptions{})
	ctx, c := t.Context(), h.client
	if got := must[[]api.Key](t)(c.ListKeys(ctx)); len(got) != 2 || got[1].State != api.KeyCurrent || got[0].Grants != 2 {
		t.Errorf("listed %+v", got)
	}
	if got := must[api.Key](t)(c.RotateKeys(ctx)); got.KID != "8899aabbccddeeff" {
		t.Errorf("rotated to %+v", got)
	}
	must[api.Grant](t)(c.Grant(ctx, api.GrantRequest{VM: "work/mail", Capability: "fs:ro:work:/docs"}))
	for _, cut := range []bool{true, false} {
		h.mu.Lock()
		h.cut = cut
		h.mu.Unlock()
		got := must[api.RevokeKeyResult](t)(c.RevokeKey(ctx, "0011", api.RevokeKeyRequest{Reason: "stolen", Wait: true, TimeoutSeconds: 2}))
		if got.Key.State != api.KeyRevoked || got.Key.Reason != "stolen" || got.Revoked == nil || got.Revoking == nil || (len(got.Revoked) == 1) != cut || (len(got.Revoking) == 1) == cut {
			t.Errorf("revoked %+v", got)
		}
	}
	if !h.last.Wait || h.last.TimeoutSeconds != 2 {
		t.Errorf("the request arrived as %+v", h.last)
	}
	_, err := c.RevokeKey(ctx, "0011", api.RevokeKeyRequest{Reason: strings.Repeat("x", 2000)})
	wantCode(t, err, api.CodeInvalid, "reason")
	_, err = c.RevokeKey(ctx, "0011", api.RevokeKeyRequest{TimeoutSeconds: -1})
	wantCode(t, err, api.CodeInvalid, "timeout_seconds")
}
