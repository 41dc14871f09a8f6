package cli_test

import (
	"context"
	"time"

	"spectrum-os.org/broker/broker/api"
)

// Renew implements api.Service. Policy of the fake gives an hour at most, and
// what derives from a grant ends with it.
func (f *fake) Renew(_ context.Context, by api.Caller, ref string, r api.RenewRequest) (api.Grant, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	g, err := f.grant(ref)
	if err != nil {
		return api.Grant{}, err
	}
	ttl := int64(60)
	if r.TTLSeconds != nil {
		ttl = *r.TTLSeconds
	}
	switch {
	case g.State != api.GrantActive:
		return api.Grant{}, api.Errorf(api.CodeConflict, "grant %s is over and cannot be renewed", g.ID)
	case g.Expires == nil:
		return api.Grant{}, api.Errorf(api.CodeConflict, "grant %s has no deadline", g.ID)
	case ttl > 3600 && !r.AcceptNarrower:
		return api.Grant{}, api.Errorf(api.CodeNarrower, "policy allows less than was asked: 1h0m0s")
	}
	renewed := time.Now()
	until := renewed.Add(time.Duration(min(ttl, 3600)) * time.Second)
	g.Expires, g.Renewed = &until, &renewed
	return *g, nil
}
