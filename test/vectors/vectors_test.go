package vectors

import (
	"bytes"
	"os"
	"testing"
)

func TestCommittedFilesAreUpToDate(t *testing.T) {
	files, err := Files()
	if err != nil {
		t.Fatal(err)
	}
	for name, want := range files {
		got, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(got, want) {
			t.Errorf("%s is not what the generator writes: run go generate ./test/vectors", name)
		}
	}
}

func TestNamesAreUnique(t *testing.T) {
	seen := make(map[string]bool)
	for _, v := range tokens().Vectors {
		if seen[v.Name] {
			t.Errorf("two token vectors are called %s", v.Name)
		}
		seen[v.Name] = true
		if (v.Error == "") != (v.Claims != nil) {
			t.Errorf("%s must have either claims or an error", v.Name)
		}
	}
}
