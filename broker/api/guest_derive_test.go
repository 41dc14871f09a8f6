package api_test

import (
	"encoding/json"
	"strings"
	"testing"

	"github.com/google/uuid"

	"spectrum-os.org/broker/broker/api"
)

func TestGuestDelegates(t *testing.T) {
	f := newFake()
	mine, other := serveGuest(t, f, mailVM, api.GuestOptions{Rate: 1e6, Burst: 1e6}), serveGuest(t, f, otherVM, api.GuestOptions{Rate: 1e6, Burst: 1e6})
	g := mine.granted(t, "fs:ro:self:/docs")
	body := func(to string) string {
		return `{"grant":"` + g.Grant.ID.String() + `","to":"` + to + `","max_uses":1,"max_depth":0,"ttl_seconds":60,"label":"x"}`
	}
	status, answer := mine.do(t, "POST", "/v1/delegations", body(otherVM.String()))
	var made api.GuestGrant
	if err := json.Unmarshal([]byte(answer), &made); status != 201 || err != nil || made.ID == uuid.Nil || strings.Contains(answer, `"token"`) {
		t.Fatalf("got %d %s", status, answer)
	}
	s1, unknown := mine.do(t, "POST", "/v1/delegations", body(uuid.NewString()))
	s2, itself := mine.do(t, "POST", "/v1/delegations", body(mailVM.String()))
	if s1 != 403 || s2 != 403 || unknown != itself || strings.Contains(unknown, "introduced") {
		t.Errorf("got %d %s and %d %s", s1, unknown, s2, itself)
	}
	s1, stolen := other.do(t, "POST", "/v1/delegations", `{"token":"`+g.Token+`","to":"`+otherVM.String()+`"}`)
	s2, forged := other.do(t, "POST", "/v1/delegations", `{"token":"Zm9yZ2Vk","to":"`+otherVM.String()+`"}`)
	if s1 != 403 || s2 != 403 || stolen != forged || !strings.Contains(stolen, `"token_refused"`) {
		t.Errorf("got %d %s and %d %s", s1, stolen, s2, forged)
	}
	for _, bad := range []string{
		`{}`, body("work/mail"), body("7D0A4B7E-1C55-4F0E-8D9C-2F6A1B3C4D5E"), `{"to":"` + otherVM.String() + `"}`,
		strings.Replace(body(otherVM.String()), `"max_uses":1`, `"max_uses":0`, 1), strings.Replace(body(otherVM.String()), `"max_depth":0`, `"max_depth":-1`, 1),
		strings.Replace(body(otherVM.String()), `"label":"x"`, `"label":"../x"`, 1), strings.Replace(body(otherVM.String()), `"label":"x"`, `"Label":"x"`, 1),
	} {
		if s, answer := mine.do(t, "POST", "/v1/delegations", bad); s != 400 || !strings.Contains(answer, `"invalid"`) {
			t.Errorf("%s got %d %s", bad, s, answer)
		}
	}
	// Its receiver fetches the token, and nobody else.
	path := "/v1/capabilities/" + made.ID.String() + "/token"
	if s, answer := other.do(t, "POST", path, ""); s != 200 || !strings.Contains(answer, `"token"`) {
		t.Errorf("got %d %s", s, answer)
	}
	s1, theirs := mine.do(t, "POST", path, "")
	s2, none := mine.do(t, "POST", "/v1/capabilities/"+uuid.NewString()+"/token", "")
	s3, rubbish := mine.do(t, "POST", "/v1/capabilities/everything/token", "")
	if s1 != 404 || s2 != 404 || s3 != 404 || theirs != none || none != rubbish {
		t.Errorf("got %d %s, %d %s and %d %s", s1, theirs, s2, none, s3, rubbish)
	}
	if s, _ := other.do(t, "POST", path, "{}"); s != 400 {
		t.Errorf("a body is taken: %d", s)
	}
}
