package api_test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"log/slog"
	"strings"
	"testing"

	"spectrum-os.org/broker/broker/api"
)

func TestTokensDoNotPrint(t *testing.T) {
	const secret = "c2VjcmV0"
	for _, v := range []any{
		api.Token{Token: secret},
		api.GuestGrant{Token: secret},
		api.GuestGranted{Token: secret, Grant: api.GuestGrant{Token: secret}},
		api.GuestRequest{Parent: secret},
		api.DropRequest{Token: secret},
	} {
		var log bytes.Buffer
		slog.New(slog.NewJSONHandler(&log, nil)).Info("x", "v", v)
		slog.New(slog.NewTextHandler(&log, nil)).Info("x", "v", v, "list", []any{v})
		for _, s := range []string{fmt.Sprint(v), fmt.Sprintf("%v %+v %#v %s", v, v, v, v), fmt.Sprint([]any{v}), log.String()} {
			if strings.Contains(s, secret) {
				t.Errorf("%T prints as %s", v, s)
			}
		}
	}
	if b, err := json.Marshal(api.Token{Token: secret}); err != nil || !strings.Contains(string(b), secret) {
		t.Errorf("the token does not reach its caller: %s, %v", b, err)
	}
}
