package policies

import (
	"bytes"
	"context"
	"path"
	"testing"

	"github.com/open-policy-agent/opa/v1/ast"
	"github.com/open-policy-agent/opa/v1/format"
	"github.com/open-policy-agent/opa/v1/storage/inmem"
	"github.com/open-policy-agent/opa/v1/tester"
)

// TestRego formats, compiles strictly and tests all that is shipped. Package
// policy holds the starters against the contract as well.
func TestRego(t *testing.T) {
	for _, dir := range append([]string{"lib"}, Starters...) {
		t.Run(dir, func(t *testing.T) {
			modules := map[string]*ast.Module{}
			parse := func(dir string, files map[string][]byte, err error) {
				if err != nil {
					t.Fatal(err)
				}
				for name, text := range files {
					name = path.Join(dir, name)
					m, err := ast.ParseModuleWithOpts(name, string(text), ast.ParserOptions{RegoVersion: ast.RegoV1})
					if err != nil {
						t.Fatal(err)
					}
					modules[name] = m
					formatted, err := format.SourceWithOpts(name, text, format.Opts{RegoVersion: ast.RegoV1})
					if err != nil {
						t.Fatal(err)
					}
					if !bytes.Equal(formatted, text) {
						t.Errorf("%s is not formatted; opa fmt makes it\n%s", name, formatted)
					}
				}
			}
			files, err := WithTests(dir)
			parse(dir, files, err)
			if dir != "lib" {
				files, err := Library()
				parse("lib", files, err)
			}
			ctx := context.Background()
			store := inmem.New()
			txn, err := store.NewTransaction(ctx)
			if err != nil {
				t.Fatal(err)
			}
			defer store.Abort(ctx, txn)
			results, err := tester.NewRunner().
				SetCompiler(ast.NewCompiler().WithStrict(true).WithEnablePrintStatements(true)).
				SetModules(modules).
				SetStore(store).
				RaiseBuiltinErrors(true).
				RunTests(ctx, txn)
			if err != nil {
				t.Fatal(err)
			}
			n := 0
			for r := range results {
				if n++; !r.Pass() {
					t.Errorf("%s: %s", r.Location, r)
				}
			}
			if n < 5 {
				t.Errorf("%d tests", n)
			}
		})
	}
}
