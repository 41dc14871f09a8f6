package capabilities

import (
	"encoding/json"
	"errors"
	"strings"
	"testing"

	"github.com/google/uuid"
	"pgregory.net/rapid"
)

var testPartitions = []uuid.UUID{
	uuid.MustParse("0d9f6e1c-5b3a-4c2d-8e7f-102132435465"),
	uuid.MustParse("0d9f6e1c-5b3a-4c2d-8e7f-102132435466"),
}

// somePath draws from few names, so that one path is often beneath another,
// and at times from all of Unicode.
func somePath() *rapid.Generator[RelPath] {
	name := rapid.OneOf(
		rapid.SampledFrom([]string{"a", "b", "ab", "..a", ":", "a b"}),
		rapid.StringN(1, 20, 80).Filter(func(s string) bool {
			return s != "." && s != ".." && !strings.ContainsAny(s, "/\x00")
		}),
	)
	return rapid.Custom(func(t *rapid.T) RelPath {
		parts := rapid.SliceOfN(name, 0, 4).Draw(t, "components")
		p, err := ParseRelPath("/" + strings.Join(parts, "/"))
		if err != nil {
			t.Fatalf("a good path is refused: %v", err)
		}
		return p
	})
}

func someFS() *rapid.Generator[Capability] {
	return rapid.Custom(func(t *rapid.T) Capability {
		c, err := NewFS(
			rapid.SampledFrom(testPartitions).Draw(t, "partition"),
			somePath().Draw(t, "path"),
			rapid.SampledFrom([]Rights{fsReadOnly, fsReadWrite}).Draw(t, "rights"))
		if err != nil {
			t.Fatal(err)
		}
		return c
	})
}

// beneath draws what a capability covers, which two independent draws seldom
// give.
func beneath(t *rapid.T, c Capability, label string) Capability {
	r := c.Resource.(FSResource)
	path := r.Path
	if rapid.Bool().Draw(t, label+" deeper") {
		path, _ = ParseRelPath(strings.TrimSuffix(path.String(), "/") + "/" + rapid.SampledFrom([]string{"a", "b"}).Draw(t, label))
	}
	rights := c.Rights
	if rapid.Bool().Draw(t, label+" read-only") {
		rights = fsReadOnly
	}
	child, err := NewFS(r.PartitionID, path, rights)
	if err != nil {
		t.Fatal(err)
	}
	return child
}

func TestCoversIsReflexive(t *testing.T) {
	kinds := NewKinds(FS{})
	rapid.Check(t, func(t *rapid.T) {
		c := someFS().Draw(t, "c")
		if !kinds.Covers(c, c) {
			t.Fatalf("%s does not cover itself", c)
		}
	})
}

func TestCoversIsTransitive(t *testing.T) {
	kinds := NewKinds(FS{})
	rapid.Check(t, func(t *rapid.T) {
		a, b, c := someFS().Draw(t, "a"), someFS().Draw(t, "b"), someFS().Draw(t, "c")
		if rapid.Bool().Draw(t, "related") {
			b = beneath(t, a, "b")
			c = beneath(t, b, "c")
			if !kinds.Covers(a, b) || !kinds.Covers(b, c) {
				t.Fatalf("%s, %s, %s: what is beneath is not covered", a, b, c)
			}
		}
		if kinds.Covers(a, b) && kinds.Covers(b, c) && !kinds.Covers(a, c) {
			t.Fatalf("%s covers %s covers %s, but the first not the last", a, b, c)
		}
	})
}

func TestCoversIsAntisymmetric(t *testing.T) {
	kinds := NewKinds(FS{})
	rapid.Check(t, func(t *rapid.T) {
		a, b := someFS().Draw(t, "a"), someFS().Draw(t, "b")
		if rapid.Bool().Draw(t, "related") {
			b = beneath(t, a, "b")
		}
		if kinds.Covers(a, b) && kinds.Covers(b, a) && !a.Equal(b) {
			t.Fatalf("%s and %s cover each other", a, b)
		}
		if a.Equal(b) != (a.String() == b.String()) {
			t.Fatalf("%s and %s: equal and spelt alike differ", a, b)
		}
	})
}

// components are the names on the way, none for "/".
func components(p RelPath) []string {
	if p.s == "/" {
		return nil
	}
	return strings.Split(p.s[1:], "/")
}

// A second opinion on Covers: the path's components, one by one.
func TestCoversAgreesWithComponents(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		a, b := someFS().Draw(t, "a"), someFS().Draw(t, "b")
		if rapid.Bool().Draw(t, "related") {
			b = beneath(t, a, "b")
		}
		ra, rb := a.Resource.(FSResource), b.Resource.(FSResource)
		up, down := components(ra.Path), components(rb.Path)
		want := ra.PartitionID == rb.PartitionID && len(up) <= len(down) && (!b.Rights.Has(RightWrite) || a.Rights.Has(RightWrite))
		for i := 0; want && i < len(up); i++ {
			want = up[i] == down[i]
		}
		if got := (FS{}).Covers(a, b); got != want {
			t.Fatalf("%s covers %s: %v, want %v", a, b, got, want)
		}
	})
}

func TestOverlapsIsACommonPart(t *testing.T) {
	kinds := NewKinds(FS{})
	rapid.Check(t, func(t *rapid.T) {
		a, b, c := someFS().Draw(t, "a"), someFS().Draw(t, "b"), someFS().Draw(t, "c")
		switch rapid.IntRange(0, 2).Draw(t, "related") {
		case 0:
			b = beneath(t, a, "b")
			c = beneath(t, b, "c")
		case 1:
			a = beneath(t, b, "a")
			c = beneath(t, a, "c")
		}
		got := kinds.Overlaps(a, b)
		if got != kinds.Overlaps(b, a) {
			t.Fatalf("%s and %s overlap one way only", a, b)
		}
		if kinds.Covers(a, c) && kinds.Covers(b, c) && !got {
			t.Fatalf("%s and %s both cover %s, and do not overlap", a, b, c)
		}
		if !got {
			return
		}
		lower := a
		if a.Resource.(FSResource).Path.Contains(b.Resource.(FSResource).Path) {
			lower = b
		}
		common, err := kinds.Attenuate(lower, Narrowing{ReadOnly: true})
		if err != nil || !kinds.Covers(a, common) || !kinds.Covers(b, common) {
			t.Fatalf("%s and %s overlap, and have nothing in common (%s, %v)", a, b, common, err)
		}
	})
}

func TestAttenuationNeverWidens(t *testing.T) {
	kinds := NewKinds(FS{})
	rapid.Check(t, func(t *rapid.T) {
		c := someFS().Draw(t, "c")
		n := Narrowing{ReadOnly: rapid.Bool().Draw(t, "read only")}
		got, err := kinds.Attenuate(c, n)
		if err != nil {
			t.Fatal(err)
		}
		if !kinds.Covers(c, got) {
			t.Fatalf("%s became %s, which is wider", c, got)
		}
		if n.ReadOnly && got.Rights.Has(RightWrite) {
			t.Fatalf("%s became %s, which can still write", c, got)
		}
		again, err := kinds.Attenuate(got, n)
		if err != nil || !again.Equal(got) {
			t.Fatalf("narrowing twice gives %s, %v, once %s", again, err, got)
		}
	})
}

func TestEncodingsRoundTrip(t *testing.T) {
	kinds := NewKinds(FS{})
	rapid.Check(t, func(t *rapid.T) {
		c := someFS().Draw(t, "c")
		if got, err := kinds.Parse(c.String(), nil); err != nil || !got.Equal(c) {
			t.Fatalf("%q parses as %q, %v", c, got, err)
		}
		asJSON, err := json.Marshal(c)
		if err != nil {
			t.Fatal(err)
		}
		if got, err := kinds.DecodeJSON(asJSON); err != nil || !got.Equal(c) {
			t.Fatalf("%s decodes as %q, %v", asJSON, got, err)
		}
		asCBOR, err := FS{}.EncodeCBOR(c.Resource)
		if err != nil {
			t.Fatal(err)
		}
		if got, err := (FS{}).DecodeCBOR(asCBOR, c.Rights); err != nil || !got.Equal(c) {
			t.Fatalf("%x decodes as %q, %v", asCBOR, got, err)
		}
	})
}

func TestSpokenNamesThePartition(t *testing.T) {
	id := testPartitions[0]
	c, err := NewKinds(FS{}).Parse("fs:ro:"+id.String()+":/backup of "+id.String(), nil)
	if err != nil {
		t.Fatal(err)
	}
	got := c.Spoken(func(uuid.UUID) string { return "work" })
	if want := "fs:ro:work:/backup of " + id.String(); got != want {
		t.Errorf("spoken is %q, want %q", got, want)
	}
	if got := c.Spoken(func(uuid.UUID) string { return "" }); got != c.String() {
		t.Errorf("without a name it is %q, want %q", got, c)
	}
}

// What is no fs capability is related to nothing, whatever its fields say.
func TestInvalidCoversNothing(t *testing.T) {
	good, err := NewFS(testPartitions[0], RelPath{"/"}, fsReadWrite)
	if err != nil {
		t.Fatal(err)
	}
	kinds := NewKinds(FS{}, toyKind{})
	for name, bad := range map[string]Capability{
		"zero":           {},
		"no resource":    {Kind: "fs", Rights: fsReadOnly},
		"no partition":   {Kind: "fs", Resource: FSResource{Path: RelPath{"/"}}, Rights: fsReadOnly},
		"no path":        {Kind: "fs", Resource: FSResource{PartitionID: testPartitions[0]}, Rights: fsReadOnly},
		"no rights":      {Kind: "fs", Resource: good.Resource},
		"write only":     {Kind: "fs", Resource: good.Resource, Rights: Rights{"write"}},
		"other kind":     {Kind: "toy", Resource: good.Resource, Rights: fsReadOnly},
		"unknown kind":   {Kind: "no", Resource: good.Resource, Rights: fsReadOnly},
		"other resource": {Kind: "fs", Resource: toyResource("x"), Rights: fsReadOnly},
	} {
		if kinds.Overlaps(good, bad) || kinds.Overlaps(bad, good) {
			t.Errorf("%v overlaps something", bad)
		}
		if kinds.Covers(good, bad) || kinds.Covers(bad, good) || kinds.Covers(bad, bad) && bad.Kind != "toy" {
			t.Errorf("%s: is covered or covers", name)
		}
		if _, err := (FS{}).Attenuate(bad, Narrowing{}); !errors.Is(err, ErrResource) {
			t.Errorf("%s: attenuating gives %v, want %v", name, err, ErrResource)
		}
	}
}

func TestMakingFSRefusesNonsense(t *testing.T) {
	if _, err := NewFS(uuid.Nil, RelPath{"/"}, fsReadOnly); !errors.Is(err, ErrResource) {
		t.Errorf("no partition: %v", err)
	}
	if _, err := NewFS(testPartitions[0], RelPath{}, fsReadOnly); !errors.Is(err, ErrResource) {
		t.Errorf("no path: %v", err)
	}
	for _, rights := range []Rights{nil, {"write"}, {"write", "read"}, {"read", "read"}, {"read", "write", "x"}} {
		if _, err := NewFS(testPartitions[0], RelPath{"/"}, rights); !errors.Is(err, ErrRights) {
			t.Errorf("rights %q: %v", rights, err)
		}
	}
	if _, err := (FS{}).EncodeCBOR(toyResource("x")); !errors.Is(err, ErrResource) {
		t.Errorf("another kind's resource: %v", err)
	}
	if _, err := (FS{}).EncodeCBOR(FSResource{}); !errors.Is(err, ErrResource) {
		t.Errorf("an empty resource: %v", err)
	}
}

func TestMakerCannotChangeTheRights(t *testing.T) {
	rights := Rights{"read"}
	c, err := NewFS(testPartitions[0], RelPath{"/"}, rights)
	if err != nil {
		t.Fatal(err)
	}
	rights[0] = "write"
	if !c.Rights.Equal(fsReadOnly) {
		t.Errorf("rights became %q", c.Rights)
	}
}

func TestMessagesOfStrangersAreShort(t *testing.T) {
	_, err := NewKinds(FS{}).Parse("fs:ro:x:/"+strings.Repeat("\x1b[2J/", 5000), nil)
	if err == nil || len(err.Error()) > 1000 || strings.Contains(err.Error(), "\x1b") {
		t.Errorf("a message of %d bytes, or with control characters", len(err.Error()))
	}
}

// A kind says what one use of it is, or that nothing of it can be counted.
func TestUse(t *testing.T) {
	kinds := NewKinds(FS{}, toyKind{})
	for name, want := range map[string]string{"fs": "one attachment of the share to a run of its VM", (toyKind{}).Name(): "", "unknown": ""} {
		if got := kinds.Use(name); got != want {
			t.Errorf("one use of %s is %q, want %q", name, got, want)
		}
	}
}
