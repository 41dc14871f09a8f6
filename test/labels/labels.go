// Package labels finds the failpoints of a source tree.
package labels

import (
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// Label is one failpoint.
type Label struct {
	Name string
	At   string // file:line
}

// Of returns the failpoints of the programs whose sources are in root, in the
// order of their files. A call whose label is no literal is an error: nobody
// could arm it by name.
func Of(root string) ([]Label, error) {
	var all []Label
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case d.IsDir() && path != root && (strings.HasPrefix(d.Name(), ".") || d.Name() == "testdata"):
			return fs.SkipDir
		case d.IsDir() || !strings.HasSuffix(path, ".go") || strings.HasSuffix(path, "_test.go"):
			return nil
		}
		found, err := ofFile(root, path)
		all = append(all, found...)
		return err
	})
	return all, err
}

func ofFile(root, path string) ([]Label, error) {
	source, err := os.ReadFile(path)
	if err != nil || !strings.Contains(string(source), "failpoint.Hit") {
		return nil, err
	}
	files := token.NewFileSet()
	file, err := parser.ParseFile(files, path, source, parser.SkipObjectResolution)
	if err != nil {
		return nil, err
	}
	var all []Label
	ast.Inspect(file, func(n ast.Node) bool {
		call, ok := n.(*ast.CallExpr)
		if !ok || !isHit(call) {
			return true
		}
		at := files.Position(call.Pos())
		name, _ := filepath.Rel(root, at.Filename)
		where := fmt.Sprintf("%s:%d", name, at.Line)
		literal, ok := call.Args[0].(*ast.BasicLit)
		if !ok || literal.Kind != token.STRING {
			err = fmt.Errorf("%s: the label is not a string literal", where)
			return false
		}
		label, unquoteErr := strconv.Unquote(literal.Value)
		if unquoteErr != nil {
			err = fmt.Errorf("%s: %w", where, unquoteErr)
		}
		all = append(all, Label{label, where})
		return true
	})
	return all, err
}

func isHit(call *ast.CallExpr) bool {
	f, ok := call.Fun.(*ast.SelectorExpr)
	if !ok || f.Sel.Name != "Hit" || len(call.Args) != 1 {
		return false
	}
	pkg, ok := f.X.(*ast.Ident)
	return ok && pkg.Name == "failpoint"
}
