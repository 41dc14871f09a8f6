package api_test

import (
	"context"
	"strings"

	"github.com/google/uuid"

	"spectrum-os.org/broker/broker/api"
)

func (f *fake) Why(_ context.Context, ref string) (api.Why, error) {
	err := f.enter("Why")
	defer f.mu.Unlock()
	if err != nil {
		return api.Why{}, err
	}
	g, err := f.findGrant(ref)
	if err != nil {
		return api.Why{}, err
	}
	uid := uint32(1000)
	return api.Why{Steps: []api.WhyStep{{Grant: *g, Action: "grant", Actor: api.Actor{Kind: "person", UID: &uid}, Seq: 7, Live: true}}}, nil
}

// Delegate knows one VM that a guest may delegate to: the other one.
func (f guestFake) Delegate(_ context.Context, vm uuid.UUID, r api.GuestDelegation) (api.GuestGrant, error) {
	err := f.enter("Delegate")
	defer f.mu.Unlock()
	if err != nil {
		return api.GuestGrant{}, err
	}
	if r.Token != "" && f.tokens(vm)[r.Token] == uuid.Nil {
		return api.GuestGrant{}, api.Errorf(api.CodeTokenRefused, "not the holder's")
	}
	if r.To != otherVM.String() {
		return api.GuestGrant{}, api.Errorf(api.CodeDenied, "VM %s was not introduced", r.To)
	}
	g, err := f.make(otherVM, "fs:ro:work:/docs", r.Label)
	if err != nil {
		return api.GuestGrant{}, err
	}
	return guestView(g), nil
}

func (f guestFake) Token(_ context.Context, vm, id uuid.UUID) (api.Token, error) {
	err := f.enter("Token")
	defer f.mu.Unlock()
	if err != nil {
		return api.Token{}, err
	}
	g, err := f.findGrant(id.String())
	if err != nil || g.Holder != vm {
		return api.Token{}, api.Errorf(api.CodeNotFound, "grant %s is not of %s", id, vm)
	}
	return api.Token{Grant: id, Token: "dG9rZW4" + strings.ReplaceAll(id.String(), "-", "_")}, nil
}
