(function_definition) @function
[
  (compound_statement) (for_statement) (while_statement) (if_statement) (switch_statement) (case_statement)
] @block
(function_declarator
  declarator: (parenthesized_declarator)
  parameters: (parameter_list) @block)

[(identifier) (type_identifier)] @word
(statement_identifier) @word @label

(function_declarator declarator: (identifier) @name)
(declaration declarator: (identifier) @var)
(init_declarator declarator: (identifier) @var)
(pointer_declarator declarator: (identifier) @var)
(array_declarator declarator: (identifier) @var)
(parenthesized_declarator (identifier) @var)
(attributed_declarator (identifier) @var)
(parameter_declaration declarator: (identifier) @var)
(type_definition declarator: (type_identifier) @var)

(declaration declarator: (pointer_declarator (function_declarator (identifier) @fixed)))
(declaration
  (storage_class_specifier) @_extern
  declarator: [(identifier) @fixed (_ declarator: (identifier) @fixed)]
  (#eq? @_extern "extern"))
(enumerator name: (identifier) @fixed)
[(preproc_def) (preproc_function_def) (preproc_call) (preproc_defined)] @frozen
(preproc_ifdef name: (identifier) @fixed)
