package cli_test

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"spectrum-os.org/broker/broker/api"
)

// fakeKeys are the keys of the fake: each grant is signed for by the one that
// was current when it was made.
func (f *fake) listKeys() []api.Key {
	if len(f.keys) == 0 {
		f.newKey()
	}
	out := slices.Clone(f.keys)
	for i := range out {
		for _, g := range f.signedBy(i) {
			if g.State == api.GrantActive {
				out[i].Grants++
			}
		}
	}
	return out
}

func (f *fake) newKey() {
	now := time.Date(2026, 3, 1, 12, len(f.keys), 0, 0, time.UTC)
	if n := len(f.keys); n > 0 {
		f.keys[n-1].State, f.keys[n-1].Retired = api.KeyRetired, &now
	}
	f.keys = append(f.keys, api.Key{KID: fmt.Sprintf("%08xaabbccdd", 0xf0000000+len(f.keys)), State: api.KeyCurrent, Epoch: 1, Created: now})
	f.keyFrom = append(f.keyFrom, len(f.grants))
}

func (f *fake) signedBy(key int) []*api.Grant {
	to := len(f.grants)
	if key+1 < len(f.keyFrom) {
		to = f.keyFrom[key+1]
	}
	from := f.keyFrom[key]
	if key == 0 {
		from = 0
	}
	return f.grants[from:to]
}

func (f *fake) ListKeys(context.Context) ([]api.Key, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.listKeys(), nil
}

func (f *fake) RotateKeys(context.Context, api.Caller) (api.Key, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.listKeys()
	f.newKey()
	k := f.keys[len(f.keys)-1]
	f.record("key.created", nil, nil, fmt.Sprintf(`{"kid":%q}`, k.KID))
	return k, nil
}

func (f *fake) RevokeKey(_ context.Context, _ api.Caller, ref string, r api.RevokeKeyRequest) (res api.RevokeKeyResult, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.listKeys()
	i := slices.IndexFunc(f.keys, func(k api.Key) bool { return strings.HasPrefix(k.KID, ref) })
	if i < 0 {
		return res, api.Errorf(api.CodeNotFound, "there is no key %s", ref)
	}
	if f.keys[i].State == api.KeyRevoked {
		return res, api.Errorf(api.CodeConflict, "key %s was revoked already", f.keys[i].KID)
	}
	if f.keys[i].State == api.KeyCurrent {
		f.newKey()
	}
	now := time.Now()
	f.keys[i].State, f.keys[i].Revoked, f.keys[i].Reason = api.KeyRevoked, &now, r.Reason
	for _, g := range f.signedBy(i) {
		for _, e := range f.end(g) {
			if !r.Wait || e.State == api.GrantRevoking {
				e := *e
				e.State = api.GrantRevoking
				res.Revoking = append(res.Revoking, e)
			} else {
				res.Revoked = append(res.Revoked, *e)
			}
		}
	}
	res.Key, res.Current = f.keys[i], f.keys[len(f.keys)-1]
	f.record("key.revoked", nil, nil, fmt.Sprintf(`{"kid":%q,"reason":%q}`, res.Key.KID, r.Reason))
	return res, nil
}
