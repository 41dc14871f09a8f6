package api_test

import (
	"reflect"
	"slices"
	"strings"
	"testing"

	"spectrum-os.org/broker/broker/api"
	"spectrum-os.org/broker/broker/api/apitest"
)

func tables() map[api.Document][]api.RouteRow {
	return map[api.Document][]api.RouteRow{
		api.HostDocument:  api.NewHostHandler(newFake(), api.HostOptions{}).Rows(),
		api.GuestDocument: api.NewGuestHandler(guestFake{newFake()}, mailVM, api.GuestOptions{}).Rows(),
	}
}

func TestEveryRouteNamesItsRule(t *testing.T) {
	for doc, rows := range tables() {
		for _, r := range rows {
			if r.Rule == api.RuleNone || !slices.Contains(api.Rules, r.Rule) {
				t.Errorf("%s: %s %s has no access rule", doc, r.Method, r.Path)
			}
			if (doc == api.GuestDocument) != (r.Rule == api.RuleHolder) {
				t.Errorf("%s: %s %s has the rule %s of the other API", doc, r.Method, r.Path, r.Rule)
			}
			if r.Changes && r.Rule != api.RulePersonRecorded && r.Rule != api.RuleHolder {
				t.Errorf("%s: %s %s changes something under the rule %s, which records nobody", doc, r.Method, r.Path, r.Rule)
			}
			if doc == api.GuestDocument && r.Hide.Status() == 500 {
				t.Errorf("%s %s does not say what hides the unknown", r.Method, r.Path)
			}
		}
	}
}

// The golden matrix: caller × rule.
func TestRulesAdmit(t *testing.T) {
	person, vm := api.Caller{Kind: api.CallerPerson, UID: 1000}, api.Caller{Kind: api.CallerVM, VM: mailVM}
	want := map[api.Rule]string{ // nobody, person without credentials, person, VM
		api.RuleNone: "----", api.RuleAnyone: "yyyy", api.RulePerson: "--y-", api.RulePersonRecorded: "--y-", api.RuleHolder: "---y",
	}
	for _, r := range api.Rules {
		got := ""
		for _, c := range []struct {
			c     api.Caller
			known bool
		}{{api.Caller{}, false}, {person, false}, {person, true}, {vm, true}} {
			switch err := r.Admit(c.c, c.known); {
			case err == nil:
				got += "y"
			case api.CodeOf(err) == api.CodeDenied:
				got += "-"
			default:
				t.Errorf("%s refuses with %v", r, err)
			}
		}
		if got != want[r] {
			t.Errorf("rule %s admits %s, want %s", r, got, want[r])
		}
	}
}

func TestRoutesAndDocumentsAgree(t *testing.T) {
	for name, rows := range tables() {
		doc := apitest.New(t, name).Doc()
		inDoc := map[string]bool{}
		for path, item := range doc.Paths.Map() {
			for method := range item.Operations() {
				inDoc[method+" "+path] = true
			}
		}
		for _, r := range rows {
			key := r.Method + " " + r.Path
			if !inDoc[key] {
				t.Errorf("%s: %s is not in the document", name, key)
				continue
			}
			delete(inDoc, key)
			op := doc.Paths.Value(r.Path).GetOperation(r.Method)
			if op.Extensions["x-access-rule"] != r.Rule.String() {
				t.Errorf("%s: %s is documented with the rule %v, served with %s", name, key, op.Extensions["x-access-rule"], r.Rule)
			}
			if (op.RequestBody != nil) != r.Body || r.Body && op.RequestBody.Value.Required != r.NeedsBody {
				t.Errorf("%s: %s differs in whether it takes a body", name, key)
			}
			var query []string
			for _, p := range op.Parameters {
				if p.Value.In == "query" {
					query = append(query, p.Value.Name)
				}
			}
			slices.Sort(query)
			if want := slices.Sorted(slices.Values(r.Query)); !slices.Equal(query, want) {
				t.Errorf("%s: %s is documented with query %v, served with %v", name, key, query, want)
			}
			if has := op.Parameters.GetByInAndName("header", "Idempotency-Key") != nil; has != r.Changes {
				t.Errorf("%s: %s: documented Idempotency-Key: %v, served: %v", name, key, has, r.Changes)
			}
		}
		for key := range inDoc {
			t.Errorf("%s: %s is documented but not served", name, key)
		}
	}
}

func TestSchemasAndTypesAgree(t *testing.T) {
	types := map[api.Document][]any{
		api.HostDocument: {
			api.Health{},
			api.Capability{},
			api.Agent{},
			api.VM{},
			api.VMList{},
			api.StopRequest{},
			api.GrantRequest{},
			api.Observed{},
			api.Grant{},
			api.GrantList{},
			api.RevokeRequest{},
			api.RevokeResult{},
			api.Token{},
			api.Key{},
			api.KeyList{},
			api.RevokeKeyRequest{},
			api.RevokeKeyResult{},
			api.Reason{},
			api.Limits{},
			api.Answer{},
			api.Verdict{},
			api.Explanation{},
			api.EngineStatus{},
			api.PolicyStatus{},
			api.Name{},
			api.NameList{},
			api.SetNameRequest{},
			api.Partition{},
			api.PartitionList{},
			api.Actor{},
			api.Event{},
			api.EventList{},
			api.AuditReport{},
			api.BrokenChain{},
			api.Problem{},
		},
		api.GuestDocument: {
			api.Self{}, api.Capability{}, api.GuestRequest{}, api.GuestGrant{}, api.GuestGrantList{}, api.GuestGranted{}, api.DropRequest{},
		},
	}
	for name, values := range types {
		schemas := apitest.New(t, name).Doc().Components.Schemas
		for _, v := range values {
			rt := reflect.TypeOf(v)
			s := schemas[rt.Name()]
			if s == nil {
				t.Errorf("%s: %s has no schema", name, rt.Name())
				continue
			}
			known := map[string]bool{}
			for i := range rt.NumField() {
				field, opts, _ := strings.Cut(rt.Field(i).Tag.Get("json"), ",")
				if field == "-" {
					continue
				}
				known[field] = true
				if s.Value.Properties[field] == nil {
					t.Errorf("%s: %s.%s is not in the schema", name, rt.Name(), field)
				}
				if required := !strings.Contains(opts, "omitempty"); required != slices.Contains(s.Value.Required, field) {
					t.Errorf("%s: %s.%s: required in the type: %v, in the schema otherwise", name, rt.Name(), field, required)
				}
			}
			for field := range s.Value.Properties {
				if !known[field] {
					t.Errorf("%s: %s.%s is in the schema only", name, rt.Name(), field)
				}
			}
			if no := s.Value.AdditionalProperties.Has; no == nil || *no {
				t.Errorf("%s: %s lets unknown fields pass", name, rt.Name())
			}
		}
		var codes []string
		for _, c := range schemas["Code"].Value.Enum {
			codes = append(codes, c.(string))
		}
		for _, c := range api.Codes() {
			if !slices.Contains(codes, string(c)) {
				t.Errorf("%s: code %s is not documented", name, c)
			}
		}
		if len(codes) != len(api.Codes()) {
			t.Errorf("%s: %d codes are documented, there are %d", name, len(codes), len(api.Codes()))
		}
	}
}

func TestReference(t *testing.T) {
	for name, rows := range tables() {
		page := api.Reference(name)
		if page != api.Reference(name) {
			t.Errorf("%s: the page differs from one time to the next", name)
		}
		for _, r := range rows {
			if !strings.Contains(page, "`"+r.Method+" "+r.Path+"`") {
				t.Errorf("%s: the page lacks %s %s", name, r.Method, r.Path)
			}
		}
		// Every link has its heading.
		headings := map[string]bool{}
		for line := range strings.Lines(page) {
			if h, is := strings.CutPrefix(line, "### "); is {
				anchor := strings.ReplaceAll(strings.ToLower(strings.TrimSpace(h)), " ", "-")
				if headings[anchor] {
					t.Errorf("%s: two headings give the anchor %s", name, anchor)
				}
				headings[anchor] = true
			}
		}
		for rest := page; ; {
			_, after, found := strings.Cut(rest, "](#")
			if !found {
				break
			}
			anchor, tail, _ := strings.Cut(after, ")")
			if !headings[anchor] {
				t.Errorf("%s: the link #%s leads nowhere", name, anchor)
			}
			rest = tail
		}
	}
	if api.Document("x").YAML() != nil {
		t.Error("there is a document x")
	}
}
